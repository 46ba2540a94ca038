//! Finding bytes in a program or a file.

/// Whether `needle` occurs in `haystack`.
pub fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    find(haystack, needle).is_some()
}

/// Where `needle` first stands in `haystack`; much faster than comparing windows.
pub fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    // SAFETY: both are valid for their lengths; memmem only reads.
    let found = unsafe {
        libc::memmem(
            haystack.as_ptr().cast(),
            haystack.len(),
            needle.as_ptr().cast(),
            needle.len(),
        )
    };
    (!found.is_null()).then(|| found as usize - haystack.as_ptr() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_found() {
        assert!(contains(b"abcdef", b"cde") && !contains(b"abcdef", b"ced"));
    }
}
