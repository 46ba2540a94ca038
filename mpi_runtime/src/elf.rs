//! Whether a shared library's file is whole. The dynamic loader maps the segments that its headers
//! name (elf(5)), and a file that ends before them is a SIGBUS without a word.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of the file header and of one program header, where addresses have 64 bits.
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// The type of a program header whose segment is mapped.
const PT_LOAD: u64 = 1;

/// Whether the file of a library that is about to be loaded has all that its headers name. Nothing
/// is said of a name that the loader looks for itself, or of a file for another processor: the
/// loader's own words are good.
///
/// # Errors
/// If it is empty or shorter, with the bytes that it has and needs.
pub fn check(path: &Path) -> Result<(), String> {
    let has_folder = path.components().nth(1).is_some();
    let Some(mut file) = File::open(path).ok().filter(|_| has_folder) else {
        return Ok(());
    };
    let length = file.metadata().map_or(0, |about| about.len());
    let mut header = [0; HEADER];
    if file.read_exact(&mut header).is_err() {
        return match length {
            0 => Err("the file is empty".into()),
            _ => Ok(()),
        };
    }
    let is_64_bit_little_endian = header.starts_with(b"\x7fELF\x02\x01");
    if !is_64_bit_little_endian {
        return Ok(());
    }
    let needed = needed(&header, |bytes, at| file.read_exact_at(bytes, at).ok());
    match needed {
        Some(needed) if needed <= length => Ok(()),
        Some(needed) => Err(format!(
            "the file has {length} bytes, and its header asks for {needed} or more: it was cut \
             off when it was copied"
        )),
        None => Err(format!(
            "the file ends within its program headers, after {length} bytes: it was cut off when \
             it was copied"
        )),
    }
}

/// How long a file must be for all its segments; none if its program headers cannot be read.
fn needed(header: &[u8; HEADER], read: impl Fn(&mut [u8], u64) -> Option<()>) -> Option<u64> {
    let start = number(&header[32..40]);
    let count = number(&header[56..58]);
    let mut longest = 0;
    for index in 0..count {
        let mut entry = [0; PROGRAM_HEADER];
        let at = start.checked_add(index * PROGRAM_HEADER as u64)?;
        read(&mut entry, at)?;
        let bytes = number(&entry[32..40]);
        // A segment without contents may begin anywhere.
        if number(&entry[..4]) == PT_LOAD && bytes > 0 {
            longest = longest.max(number(&entry[8..16]).saturating_add(bytes));
        }
    }
    Some(longest)
}

/// A little-endian number of up to eight bytes.
fn number(bytes: &[u8]) -> u64 {
    let bytes = bytes.iter().rev();
    bytes.fold(0, |number, &byte| number << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_cut_off_is_told() {
        let own = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let path = std::env::temp_dir().join(format!("mpi_cuda_elf_{}", std::process::id()));
        let of = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            check(&path)
        };
        assert_eq!(of(&own), Ok(()));
        let part = of(&own[..4096]).unwrap_err();
        assert!(part.contains("has 4096 bytes"), "{part}");
        let start = of(&own[..HEADER + 8]).unwrap_err();
        assert!(start.contains("within its program headers"), "{start}");
        assert!(of(b"").unwrap_err().contains("empty"));
        // The loader says what these are.
        assert_eq!(
            of(b"/* a linker script, which has many words, and no header at all */"),
            Ok(())
        );
        std::fs::remove_file(&path).unwrap();
        assert_eq!(check(&path), Ok(()));
    }
}
