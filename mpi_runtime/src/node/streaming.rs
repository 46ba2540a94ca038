//! Copies that leave the caches alone: for results so long that they would not stay there, and of
//! which a processor would otherwise read each line before it writes it.

/// Copies `from` to `to`, which are as long. [`finish`] comes behind the last one.
#[inline]
pub(super) fn copy(from: &[u8], to: &mut [u8]) {
    assert_eq!(from.len(), to.len());
    #[cfg(target_arch = "x86_64")]
    x86_64::copy(from, to);
    #[cfg(not(target_arch = "x86_64"))]
    to.copy_from_slice(from);
}

/// What was copied is there for other threads that are told so from now on.
#[inline]
pub(super) fn finish() {
    // Stores of this kind are not ordered with others (Intel's manual, volume 1, section 10.4.6.2).
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every processor of this kind has this instruction.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};

    const WIDTH: usize = size_of::<__m128i>();

    #[inline]
    pub(super) fn copy(from: &[u8], to: &mut [u8]) {
        // SAFETY: any bytes are a vector.
        let (before, vectors, behind) = unsafe { to.align_to_mut::<__m128i>() };
        let (first, rest) = from.split_at(before.len());
        let (middle, last) = rest.split_at(vectors.len() * WIDTH);
        before.copy_from_slice(first);
        for (to, from) in vectors.iter_mut().zip(middle.as_chunks::<WIDTH>().0) {
            // SAFETY: a vector is read from as many bytes, and written where one is aligned. Every
            // processor of this kind has these instructions.
            unsafe { _mm_stream_si128(to, _mm_loadu_si128(from.as_ptr().cast())) };
        }
        behind.copy_from_slice(last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_copied_from_anywhere_to_anywhere() {
        let from: Vec<u8> = (0..300).map(|i| i as u8).collect();
        for (start, place, length) in [(0, 0, 300), (1, 3, 200), (5, 0, 3), (7, 9, 16), (0, 1, 0)] {
            let mut to = vec![7u8; 300];
            copy(&from[start..start + length], &mut to[place..place + length]);
            finish();
            assert!(to[place..place + length] == from[start..start + length]);
            let mut others = to[..place].iter().chain(&to[place + length..]);
            assert!(others.all(|&byte| byte == 7));
        }
    }
}
