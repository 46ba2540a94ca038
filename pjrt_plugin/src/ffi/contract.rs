//! What each target takes and gives, and the one check of a call against it. Handlers use nothing
//! of a call but what has passed.

#![forbid(unsafe_code)]

use mpi_runtime::ElementType;
use pjrt_sys::{
    XLA_FFI_Buffer, XLA_FFI_DataType_S32, XLA_FFI_DataType_TOKEN, XLA_FFI_DataType_U32,
};

use super::attributes::Value;
use super::frame::{Frame, array, dtype_name};
use super::targets::{READS_STATUS, is_uniform_mark};
use crate::error::Error;

/// A target: its operands, its results and its attributes.
pub struct Contract {
    pub target: &'static str,
    pub operand: Data,
    pub result: Data,
    /// In the order of their names.
    pub attributes: &'static [Attribute],
    /// It is one of `include/mpi_cuda.h`: integers have 32 or 64 bits and defaults, and the marks
    /// of programs may stand beside them (`targets.rs`). Else they are int64, and none is left out
    /// whose value is used and which is not among `zeros`.
    pub is_public: bool,
    /// Those that may be left out and are 0 then, by their bits: nothing has to be put in.
    pub zeros: u32,
}

/// What stands before the tokens, as operand or as result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// Only tokens.
    Nothing,
    /// An array of any type that MPI moves.
    Array,
    /// A result whose type is the operand's.
    Like,
    /// An operand that tells its type alone.
    Empty,
    /// A `u32[]`: a message that was started, or the number of a device.
    Number,
}

/// An attribute.
#[derive(Clone, Copy)]
pub struct Attribute {
    pub name: &'static str,
    pub meaning: Meaning,
    pub default: i64,
}

/// What an attribute is for.
#[derive(Clone, Copy)]
pub enum Meaning {
    /// Its value is used.
    Value(Field),
    /// It must agree with an array.
    Count(Of),
    /// The arrays themselves say it.
    Unused,
    /// It is a list of integers of 64 bits.
    List(List),
}

/// Of what an attribute is the number of elements.
#[derive(Clone, Copy)]
pub enum Of {
    Operand,
    /// What the operand has for each rank, along its leading dimension.
    OperandRow,
    Result,
}

macro_rules! fields {
    ($($field:ident),+) => {
        /// Attributes whose values handlers use.
        #[derive(Clone, Copy)]
        pub enum Field { $($field),+ }
        const FIELDS: usize = [$(Field::$field),+].len();
    };
}
fields!(
    Comm,
    Op,
    Peer,
    Source,
    SendTag,
    RecvTag,
    Status,
    Table,
    Program,
    Place,
    Type,
    Sources,
    Destinations
);

/// Attributes that are lists of numbers.
#[derive(Clone, Copy)]
pub enum List {
    Counts,
    RecvCounts,
}

/// The values of the attributes, by field, and of lists.
#[derive(Default)]
pub struct Values<'a>([i64; FIELDS], [&'a [i64]; 2]);

impl<'a> Values<'a> {
    #[inline]
    pub fn get(&self, field: Field) -> i64 {
        self.0[field as usize]
    }

    /// Empty if it is not there.
    #[inline]
    pub fn list(&self, list: List) -> &'a [i64] {
        self.1[list as usize]
    }
}

impl Contract {
    /// Checks a call of one operand and one result at most, which are then arrays of the frame's,
    /// and fills in the values of its attributes. Nothing is moved: this is on the path of every
    /// operation.
    #[inline]
    pub fn check<'a>(&self, frame: &Frame<'a>, values: &mut Values<'a>) -> Result<(), Error> {
        self.data(self.operand, frame.args, "operand")?;
        self.data(self.result, frame.rets, "result")?;
        if self.result == Data::Like && frame.args[0].dtype != frame.rets[0].dtype {
            return Err(self.unlike(frame.args[0], 0, frame.rets[0], 0));
        }
        self.values(frame, values, |_, _| Ok(false))
    }

    /// Checks the attributes; `other` gets those that the table does not have, and says whether it
    /// takes one.
    #[inline]
    pub fn values<'a>(
        &self,
        frame: &Frame<'a>,
        values: &mut Values<'a>,
        mut other: impl FnMut(&[u8], Value<'_>) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        let rows = self.attributes;
        let (mut seen, mut next) = (0u32, 0);
        for (name, value) in frame.attributes().iter() {
            // Both are in the order of the names, so the row is the next one or soon after it.
            let Some(index) = find(rows, next, name) else {
                if self.is_public && is_mark(name, &value) || other(name, value)? {
                    continue;
                }
                return Err(self.unknown(name, &value));
            };
            let row = &rows[index];
            if seen >> index & 1 != 0 {
                return Err(self.bad(format!("attribute {} is there twice", row.name)));
            }
            (seen, next) = (seen | 1 << index, index + 1);
            if let Meaning::List(list) = row.meaning {
                values.1[list as usize] = self.list(row.name, &value)?;
                continue;
            }
            let number = match value.int64() {
                Some(number) => number,
                None => self.other_width(row.name, &value)?,
            };
            match row.meaning {
                Meaning::Value(field) => values.0[field as usize] = number,
                Meaning::Count(of) => self.count(row.name, number, of, frame)?,
                Meaning::Unused | Meaning::List(_) => {}
            }
        }
        if seen | self.zeros != (1 << rows.len()) - 1 {
            self.complete(seen, values)?;
        }
        Ok(())
    }

    /// Puts in the defaults of attributes that are not there.
    fn complete(&self, seen: u32, values: &mut Values<'_>) -> Result<(), Error> {
        for (index, row) in self.attributes.iter().enumerate() {
            let Meaning::Value(field) = row.meaning else {
                continue;
            };
            if seen >> index & 1 == 0 {
                if !self.is_public && self.zeros >> index & 1 == 0 {
                    let (name, wanted) = (row.name, self.wanted());
                    return Err(self.bad(format!("attribute {name} is missing; it {wanted}")));
                }
                values.0[field as usize] = row.default;
            }
        }
        Ok(())
    }

    fn list<'a>(&self, name: &str, value: &Value<'a>) -> Result<&'a [i64], Error> {
        value.list().ok_or_else(|| {
            self.bad(format!(
                "attribute {name} is {value}, and must be an array of int64"
            ))
        })
    }

    #[cold]
    fn other_width(&self, name: &str, value: &Value<'_>) -> Result<i64, Error> {
        value.integer().filter(|_| self.is_public).ok_or_else(|| {
            self.bad(format!(
                "attribute {name} is {value}, and {}",
                self.wanted()
            ))
        })
    }

    /// What an attribute must be.
    fn wanted(&self) -> &'static str {
        if self.is_public {
            "must be an integer of 32 or 64 bits that fits int64"
        } else {
            "must be an int64"
        }
    }

    fn count(&self, name: &str, given: i64, of: Of, frame: &Frame<'_>) -> Result<(), Error> {
        let (buffer, what) = match of {
            Of::Operand | Of::OperandRow => (array(frame.args[0]), "operand"),
            Of::Result => (array(frame.rets[0]), "result"),
        };
        let rows = match of {
            Of::OperandRow => buffer.shape().first().copied().unwrap_or(1),
            _ => 1,
        };
        let elements = buffer.elements() / rows.max(1);
        if given == elements {
            return Ok(());
        }
        let each = if rows == 1 { "" } else { " for each rank" };
        Err(self.bad(format!(
            "attribute {name} is {given}, and the {what} {buffer} has {elements} elements{each}"
        )))
    }

    /// Checks operands or results: the data, then tokens.
    #[inline]
    fn data(&self, wanted: Data, given: &[&XLA_FFI_Buffer], what: &str) -> Result<(), Error> {
        if wanted == Data::Nothing {
            return self.tokens(given, 0, what);
        }
        let [first, rest @ ..] = given else {
            return Err(self.bad(format!(
                "{what} 0 is missing; it must be {}",
                wanted.words()
            )));
        };
        self.tokens(rest, 1, what)?;
        let elements = self.array(first, 0, what)?;
        let fits = match wanted {
            Data::Empty => elements == 0,
            Data::Number => first.dtype == XLA_FFI_DataType_U32 && first.rank == 0,
            _ => true,
        };
        if fits {
            return Ok(());
        }
        let (shown, wanted) = (words(first), wanted.words());
        Err(self.bad(format!("{what} 0 is {shown}, and must be {wanted}")))
    }

    /// Checks that these operands or results, of which the first has this number, are tokens.
    #[inline]
    pub fn tokens(&self, given: &[&XLA_FFI_Buffer], first: usize, what: &str) -> Result<(), Error> {
        match given.iter().position(|buffer| !is_token(buffer)) {
            None => Ok(()),
            Some(index) => Err(self.no_token(given[index], first + index, what)),
        }
    }

    /// Checks that a buffer is an array whose memory may be read, or written if it is a result;
    /// says how many elements it has.
    #[inline]
    pub fn array(&self, buffer: &XLA_FFI_Buffer, index: usize, what: &str) -> Result<i64, Error> {
        let array = array(buffer);
        let mut elements = 1i64;
        let mut fits = true;
        for &length in array.shape() {
            let (product, overflows) = elements.overflowing_mul(length);
            (elements, fits) = (product, fits & !overflows & (length >= 0));
        }
        let (bytes, overflows) = elements.overflowing_mul(array.dtype().size() as i64);
        let is_array =
            array.dtype() != ElementType::Other && (bytes == 0 || !array.data().is_null());
        if fits & !overflows & is_array {
            return Ok(elements);
        }
        Err(self.no_array(buffer, index, what))
    }

    #[cold]
    fn no_array(&self, buffer: &XLA_FFI_Buffer, index: usize, what: &str) -> Error {
        let array = array(buffer);
        let shown = words(buffer);
        if buffer.dtype == XLA_FFI_DataType_TOKEN {
            return self.bad(format!("{what} {index} is a token, and must be an array"));
        }
        if array.dtype() == ElementType::Other {
            return self.bad(format!(
                "{what} {index} is {shown}: a type of less than 8 bits is not supported; cast to a \
                 supported type first"
            ));
        }
        if array.data().is_null() {
            return self.bad(format!("{what} {index} is {shown} without memory"));
        }
        self.bad(format!(
            "{what} {index} is {shown}, which no memory can hold"
        ))
    }

    #[cold]
    fn no_token(&self, buffer: &XLA_FFI_Buffer, index: usize, what: &str) -> Error {
        let shown = words(buffer);
        let data = if what == "operand" {
            self.operand
        } else {
            self.result
        };
        let data = data.words();
        self.bad(format!(
            "{what} {index} is {shown}, and must be a token (an s32[] or an XLA token): it takes \
             {data}, then tokens"
        ))
    }

    /// The error for a result whose type is not its operand's.
    #[cold]
    pub fn unlike(
        &self,
        operand: &XLA_FFI_Buffer,
        operand_index: usize,
        result: &XLA_FFI_Buffer,
        result_index: usize,
    ) -> Error {
        self.bad(format!(
            "result {result_index} is {}, and must be of {} as operand {operand_index}, which is \
             {}",
            words(result),
            dtype_name(operand.dtype),
            words(operand)
        ))
    }

    #[cold]
    fn unknown(&self, name: &[u8], value: &Value<'_>) -> Error {
        let names: Vec<_> = self.attributes.iter().map(|row| row.name).collect();
        let known = if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        };
        let shown = String::from_utf8_lossy(&name[..name.len().min(80)]);
        self.bad(format!(
            "attribute {shown} ({value}) is not known; its attributes are {known}"
        ))
    }

    /// An error that says whose it is.
    #[cold]
    pub fn bad(&self, reason: impl std::fmt::Display) -> Error {
        Error::invalid(format!("{}: {reason}", self.target))
    }
}

impl Data {
    fn words(self) -> &'static str {
        match self {
            Data::Nothing => "no array",
            Data::Array => "an array",
            Data::Like => "an array of the operand's type",
            Data::Empty => "an empty array, which tells the type alone",
            Data::Number => "a uint32[]",
        }
    }
}

/// The row of that name: from `next` on, or else before.
#[inline]
fn find(rows: &[Attribute], next: usize, name: &[u8]) -> Option<usize> {
    let is = |row: &Attribute| is_same(row.name.as_bytes(), name);
    let after = rows.get(next..)?.iter().position(is);
    after
        .map(|index| next + index)
        .or_else(|| rows[..next].iter().position(is))
}

/// Whether two names are the same. They are short, and a call of memcmp for each attribute of each
/// operation takes longer than the words that most names consist of.
#[inline]
fn is_same(one: &[u8], other: &[u8]) -> bool {
    if one.len() != other.len() {
        return false;
    }
    match one.len() {
        4..=8 => {
            one.first_chunk::<4>() == other.first_chunk()
                && one.last_chunk::<4>() == other.last_chunk()
        }
        9..=16 => {
            one.first_chunk::<8>() == other.first_chunk()
                && one.last_chunk::<8>() == other.last_chunk()
        }
        _ => one == other,
    }
}

#[inline]
fn is_mark(name: &[u8], value: &Value<'_>) -> bool {
    let value = value.integer();
    is_uniform_mark(name) && value.is_some() || name == READS_STATUS.as_bytes() && value == Some(1)
}

/// An `s32[]`, or a token of XLA's own.
#[inline]
fn is_token(buffer: &XLA_FFI_Buffer) -> bool {
    buffer.dtype == XLA_FFI_DataType_TOKEN
        || buffer.dtype == XLA_FFI_DataType_S32 && buffer.rank == 0
}

/// `float32[3,4]`
pub fn words(buffer: &XLA_FFI_Buffer) -> String {
    let shape: Vec<String> = array(buffer).shape().iter().map(i64::to_string).collect();
    format!("{}[{}]", dtype_name(buffer.dtype), shape.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_every_length_are_told_apart() {
        let letters = b"abcdefghijklmnopqrstuvwxyz";
        for length in 0..letters.len() {
            let name = &letters[..length];
            assert!(is_same(name, name));
            assert!(!is_same(name, &letters[..length + 1]));
            for place in 0..length {
                let mut other = name.to_vec();
                other[place] = b'_';
                assert!(!is_same(name, &other) && !is_same(&other, name));
            }
        }
    }
}
