//! The texts of a record: each is kept once, and has a number.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, Ordering};

use parking_lot::Mutex;

use super::layout::Record;

/// Bytes of a text that are kept.
const LONGEST: usize = 400;

/// The numbers of the texts.
pub struct Texts {
    known: Mutex<Known>,
}

struct Known {
    by_text: BTreeMap<Box<[u8]>, u32>,
    /// Numbers of the texts of what has a number of its own.
    by_key: BTreeMap<u64, u32>,
    /// Bytes in use, but for the first, which is no text's. All zeros at first, so that the record
    /// of this process takes no room in the library's file.
    length: usize,
}

impl Texts {
    /// No text yet.
    pub const fn new() -> Texts {
        Texts {
            known: Mutex::new(Known {
                by_text: BTreeMap::new(),
                by_key: BTreeMap::new(),
                length: 0,
            }),
        }
    }

    /// The number of a text; 0 if it is empty, or no room is left.
    pub fn number(&self, record: &Record, text: &[u8]) -> u32 {
        let text = &text[..text.len().min(LONGEST)];
        if text.is_empty() {
            return 0;
        }
        let mut known = self.known.lock();
        match known.by_text.get(text) {
            Some(&number) => number,
            None => known.add(record, text),
        }
    }

    /// The number of the text of what has the number `key`.
    pub fn of(&self, record: &Record, key: u64, text: &[u8]) -> u32 {
        if let Some(&number) = self.known.lock().by_key.get(&key) {
            return number;
        }
        let number = self.number(record, text);
        self.known.lock().by_key.insert(key, number);
        number
    }
}

impl Known {
    fn add(&mut self, record: &Record, text: &[u8]) -> u32 {
        let start = self.length + 1;
        // The last byte of all stays NUL.
        let Some(place) = record.texts.get(start..start + text.len() + 1) else {
            return 0;
        };
        put(&place[..text.len()], text);
        self.length += text.len() + 1;
        record
            .header
            .text_bytes
            .store(self.length as u64 + 1, Ordering::Release);
        let number = start as u32;
        self.by_text.insert(text.into(), number);
        number
    }
}

/// The text of that number; empty if there is none.
pub fn get(record: &Record, number: u64) -> String {
    let bytes = record.texts.get(number as usize..).unwrap_or_default();
    let bytes = bytes.iter().map(|byte| byte.load(Ordering::Relaxed));
    let bytes: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Writes bytes to a place as long as they.
pub fn put(place: &[AtomicU8], bytes: &[u8]) {
    for (to, &byte) in place.iter().zip(bytes) {
        // Nothing else in a text ends it.
        to.store(if byte == 0 { b' ' } else { byte }, Ordering::Relaxed);
    }
}
