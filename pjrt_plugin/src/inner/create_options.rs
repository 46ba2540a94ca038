//! Create options of a client: reading those that the framework gives, and writing ours.

use std::marker::PhantomData;

use pjrt_sys::*;

use super::call::{bytes, new_args, slice};
use super::handles::handle::FromRaw;
use crate::error::Error;

/// An option that the framework gives, which is valid while it creates a client.
pub struct GivenOption<'a> {
    /// Its name.
    pub name: String,
    /// Its value as text; empty if it is a list.
    pub text: String,
    /// Its value, if it is a whole number.
    pub number: Option<i64>,
    raw: PJRT_NamedValue,
    given: PhantomData<&'a PJRT_NamedValue>,
}

impl<'a> FromRaw<(*const PJRT_NamedValue, usize)> for Vec<GivenOption<'a>> {
    unsafe fn from_raw(list: (*const PJRT_NamedValue, usize)) -> Result<Self, Error> {
        let read = |option: &PJRT_NamedValue| {
            let value = &option.__bindgen_anon_1;
            let text = |data, size| {
                // SAFETY: texts have their lengths, and are valid as the list is.
                String::from_utf8_lossy(unsafe { bytes(data, size) }).into_owned()
            };
            // SAFETY: the union is read by its type.
            let (number, written) = unsafe {
                match option.type_ {
                    PJRT_NamedValue_kString => (None, text(value.string_value, option.value_size)),
                    PJRT_NamedValue_kInt64 => {
                        (Some(value.int64_value), value.int64_value.to_string())
                    }
                    PJRT_NamedValue_kFloat => (None, value.float_value.to_string()),
                    PJRT_NamedValue_kBool => (None, u8::from(value.bool_value).to_string()),
                    _ => (None, String::new()),
                }
            };
            GivenOption {
                name: text(option.name, option.name_size),
                text: written,
                number,
                raw: *option,
                given: PhantomData,
            }
        };
        // SAFETY: the list is as long as it says, and valid while it is used.
        Ok(unsafe { slice(list.0, list.1) }.iter().map(read).collect())
    }
}

/// The value of an option of ours.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A number.
    Int(i64),
    /// Yes or no.
    Bool(bool),
    /// Words.
    Text(String),
    /// Numbers.
    List(Vec<i64>),
}

/// The options as the inner plugin takes them; they live as long as what they are made of.
pub fn raw_options(given: &[GivenOption<'_>], own: &[(&str, Value)]) -> Vec<PJRT_NamedValue> {
    let own = own.iter().map(|(name, value)| named(name, value));
    given.iter().map(|option| option.raw).chain(own).collect()
}

fn named(name: &str, value: &Value) -> PJRT_NamedValue {
    let mut option = new_args::<PJRT_NamedValue>();
    (option.name, option.name_size) = (name.as_ptr().cast(), name.len());
    option.value_size = 1;
    let place = &mut option.__bindgen_anon_1;
    option.type_ = match value {
        Value::Int(number) => {
            place.int64_value = *number;
            PJRT_NamedValue_kInt64
        }
        Value::Bool(yes) => {
            place.bool_value = *yes;
            PJRT_NamedValue_kBool
        }
        Value::Text(text) => {
            place.string_value = text.as_ptr().cast();
            option.value_size = text.len();
            PJRT_NamedValue_kString
        }
        Value::List(numbers) => {
            place.int64_array_value = numbers.as_ptr();
            option.value_size = numbers.len();
            PJRT_NamedValue_kInt64List
        }
    };
    option
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_as_they_are_written() {
        let own = [
            ("number", Value::Int(7)),
            ("text", Value::Text("words".into())),
            ("yes", Value::Bool(true)),
        ];
        let raw = raw_options(&[], &own);
        // SAFETY: the options live as long as `own`.
        let read: Vec<GivenOption<'_>> =
            unsafe { FromRaw::from_raw((raw.as_ptr(), raw.len())) }.unwrap();
        let texts: Vec<_> = read.iter().map(|o| (&o.name[..], &o.text[..])).collect();
        assert_eq!(texts, [("number", "7"), ("text", "words"), ("yes", "1")]);
        assert_eq!(read[0].number, Some(7));
        assert_eq!(read[2].number, None);
    }
}
