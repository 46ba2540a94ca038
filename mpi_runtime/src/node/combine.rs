//! Reductions of arrays that lie in memory as bytes, element by element, with the widest vectors
//! that the processor has.
//!
//! - Integers wrap around, as numpy's do.
//! - MIN and MAX of real numbers are ordered by value and then sign, and every NaN becomes the same
//!   one, as in `mpi_runtime/shim/src/extremum.rs`.
//! - Real numbers are added and multiplied with denormals, whatever the thread does with those
//!   elsewhere: some threads of XLA's take them for zero, and others do not.

use mpi_shim_abi::{Datatype, Reduction};

/// Bytes that are reduced over all ranks before the next: they stay in the first cache.
const TILE: usize = 4096;

/// How two arrays of the same element type are reduced.
#[derive(Clone, Copy)]
pub(crate) struct Combine {
    /// The third becomes the reduction of the first and the second.
    into: fn(&[u8], &[u8], &mut [u8]),
    /// The first becomes the reduction of the first and the second.
    onto: fn(&mut [u8], &[u8]),
}

impl Combine {
    /// That of elements of `element`, if it is one of those here.
    #[inline]
    pub(crate) fn of(reduction: Reduction, element: Datatype) -> Option<Combine> {
        match element {
            Datatype::I32 => by::<i32, 4>(reduction),
            Datatype::I64 => by::<i64, 8>(reduction),
            Datatype::U32 => by::<u32, 4>(reduction),
            Datatype::U64 => by::<u64, 8>(reduction),
            Datatype::F32 => by::<f32, 4>(reduction),
            Datatype::F64 => by::<f64, 8>(reduction),
            _ => None,
        }
    }

    /// The first becomes the reduction of the first and the second, which are as long.
    pub(crate) fn onto(&self, first: &mut [u8], second: &[u8]) {
        let _with_denormals = float_state::with_denormals();
        (self.onto)(first, second);
    }

    /// `result` becomes the reduction of all `parts`, of which there are at least two, in their
    /// order; and so does `copy`. All have the same length.
    pub(crate) fn all(&self, parts: &[&[u8]], result: &mut [u8], mut copy: Option<&mut [u8]>) {
        let _with_denormals = float_state::with_denormals();
        let [first, second, others @ ..] = parts else {
            unreachable!("a communicator has two ranks or more")
        };
        let mut start = 0;
        for tile in result.chunks_mut(TILE) {
            let place = start..start + tile.len();
            start = place.end;
            (self.into)(&first[place.clone()], &second[place.clone()], tile);
            for part in others {
                (self.onto)(tile, &part[place.clone()]);
            }
            if let Some(copy) = &mut copy {
                copy[place].copy_from_slice(tile);
            }
        }
    }
}

/// What lies in memory as `N` bytes.
trait Stored<const N: usize>: Copy {
    fn read(bytes: [u8; N]) -> Self;
    fn bytes(self) -> [u8; N];
}

macro_rules! stored {
    ($($kind:ty, $size:literal;)+) => {$(
        impl Stored<$size> for $kind {
            #[inline(always)]
            fn read(bytes: [u8; $size]) -> Self {
                Self::from_ne_bytes(bytes)
            }
            #[inline(always)]
            fn bytes(self) -> [u8; $size] {
                self.to_ne_bytes()
            }
        }
    )+};
}

stored! {
    i32, 4;
    i64, 8;
    u32, 4;
    u64, 8;
    f32, 4;
    f64, 8;
}

/// A number that lies in memory as `N` bytes.
trait Number<const N: usize>: Stored<N> {
    fn sum(self, other: Self) -> Self;
    fn product(self, other: Self) -> Self;
    fn extremum<const LARGER: bool>(self, other: Self) -> Self;
}

macro_rules! integers {
    ($($kind:ty, $size:literal;)+) => {$(
        impl Number<$size> for $kind {
            #[inline(always)]
            fn sum(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn product(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }
            #[inline(always)]
            fn extremum<const LARGER: bool>(self, other: Self) -> Self {
                if LARGER { self.max(other) } else { self.min(other) }
            }
        }
    )+};
}

integers! {
    i32, 4;
    i64, 8;
    u32, 4;
    u64, 8;
}

macro_rules! reals {
    ($($kind:ty, $signed:ty, $size:literal, $nan:literal;)+) => {$(
        impl Number<$size> for $kind {
            #[inline(always)]
            fn sum(self, other: Self) -> Self {
                self + other
            }
            #[inline(always)]
            fn product(self, other: Self) -> Self {
                self * other
            }
            #[inline(always)]
            fn extremum<const LARGER: bool>(self, other: Self) -> Self {
                const INFINITY: $signed = <$kind>::INFINITY.to_bits() as $signed;
                let (x, y) = (self.to_bits() as $signed, other.to_bits() as $signed);
                // Grows with the value: all bits but the sign of a negative one are turned.
                let key = |bits: $signed| bits ^ ((bits >> (<$signed>::BITS - 1)) & <$signed>::MAX);
                let is_nan = |bits: $signed| bits & <$signed>::MAX > INFINITY;
                let chosen = if (key(x) > key(y)) == LARGER { x } else { y };
                let bits = if is_nan(x) | is_nan(y) { $nan } else { chosen };
                <$kind>::from_bits(bits as _)
            }
        }
    )+};
}

reals! {
    f32, i32, 4, 0x7fc0_0000;
    f64, i64, 8, 0x7ff8_0000_0000_0000;
}

/// What the loops below do with two numbers.
const SUM: u8 = 0;
const PRODUCT: u8 = 1;
const SMALLER: u8 = 2;
const LARGER: u8 = 3;

fn by<T: Number<N>, const N: usize>(reduction: Reduction) -> Option<Combine> {
    const fn combine<T: Number<N>, const N: usize, const WHAT: u8>() -> Combine {
        Combine {
            into: into::<T, N, WHAT>,
            onto: onto::<T, N, WHAT>,
        }
    }
    match reduction {
        Reduction::Sum => Some(combine::<T, N, SUM>()),
        Reduction::Prod => Some(combine::<T, N, PRODUCT>()),
        Reduction::Min => Some(combine::<T, N, SMALLER>()),
        Reduction::Max => Some(combine::<T, N, LARGER>()),
        _ => None,
    }
}

#[inline(always)]
fn one<T: Number<N>, const N: usize, const WHAT: u8>(left: [u8; N], right: [u8; N]) -> [u8; N] {
    let (left, right) = (T::read(left), T::read(right));
    let result = match WHAT {
        SUM => left.sum(right),
        PRODUCT => left.product(right),
        SMALLER => left.extremum::<false>(right),
        _ => left.extremum::<true>(right),
    };
    result.bytes()
}

#[inline(always)]
fn each_into<T: Number<N>, const N: usize, const WHAT: u8>(
    left: &[u8],
    right: &[u8],
    result: &mut [u8],
) {
    let (left, right) = (left.as_chunks().0, right.as_chunks().0);
    for ((a, b), to) in left.iter().zip(right).zip(result.as_chunks_mut().0) {
        *to = one::<T, N, WHAT>(*a, *b);
    }
}

#[inline(always)]
fn each_onto<T: Number<N>, const N: usize, const WHAT: u8>(left: &mut [u8], right: &[u8]) {
    for (a, b) in left.as_chunks_mut().0.iter_mut().zip(right.as_chunks().0) {
        *a = one::<T, N, WHAT>(*a, *b);
    }
}

fn into<T: Number<N>, const N: usize, const WHAT: u8>(left: &[u8], right: &[u8], to: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    {
        /// The same loop, compiled for wider vectors.
        #[target_feature(enable = "avx2")]
        fn wide<T: Number<N>, const N: usize, const WHAT: u8>(
            left: &[u8],
            right: &[u8],
            to: &mut [u8],
        ) {
            each_into::<T, N, WHAT>(left, right, to);
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has what `wide` needs.
            return unsafe { wide::<T, N, WHAT>(left, right, to) };
        }
    }
    each_into::<T, N, WHAT>(left, right, to);
}

fn onto<T: Number<N>, const N: usize, const WHAT: u8>(left: &mut [u8], right: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    {
        /// The same loop, compiled for wider vectors.
        #[target_feature(enable = "avx2")]
        fn wide<T: Number<N>, const N: usize, const WHAT: u8>(left: &mut [u8], right: &[u8]) {
            each_onto::<T, N, WHAT>(left, right);
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has what `wide` needs.
            return unsafe { wide::<T, N, WHAT>(left, right) };
        }
    }
    each_onto::<T, N, WHAT>(left, right);
}

/// How this thread computes with real numbers.
#[cfg(target_arch = "x86_64")]
mod float_state {
    use std::arch::asm;

    /// The state in which a program starts: nothing traps, rounding is to the nearest, and
    /// denormals are numbers (System V ABI for x86-64, section 3.2.1).
    const USUAL: u32 = 0x1f80;
    /// Its bits that say what has happened, which change nothing.
    const FLAGS: u32 = 0x3f;

    /// The state that a thread had, which it has again when this is dropped.
    pub(super) struct Former(Option<u32>);

    /// Sets the usual state.
    #[inline]
    pub(super) fn with_denormals() -> Former {
        let state = state();
        let differs = state & !FLAGS != USUAL;
        if differs {
            set(USUAL);
        }
        Former(differs.then_some(state))
    }

    impl Drop for Former {
        #[inline]
        fn drop(&mut self) {
            if let Some(state) = self.0 {
                set(state);
            }
        }
    }

    #[inline]
    pub(super) fn state() -> u32 {
        let mut state = 0u32;
        // SAFETY: it stores the thread's state of four bytes to the variable.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut state, options(nostack)) };
        state
    }

    #[inline]
    pub(super) fn set(state: u32) {
        // SAFETY: it loads a state that the thread had, or the usual one.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const state, options(nostack)) };
    }
}

/// How this thread computes with real numbers: left alone on other processors.
#[cfg(not(target_arch = "x86_64"))]
mod float_state {
    pub(super) fn with_denormals() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all<T: Number<N>, const N: usize>(
        reduction: Reduction,
        element: Datatype,
        rows: &[Vec<T>],
    ) -> Vec<T> {
        let bytes = |row: &Vec<T>| row.iter().flat_map(|x| x.bytes()).collect::<Vec<u8>>();
        let rows: Vec<Vec<u8>> = rows.iter().map(bytes).collect();
        let parts: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
        let mut result = vec![7; parts[0].len()];
        let mut copy = result.clone();
        let combine = Combine::of(reduction, element).unwrap();
        combine.all(&parts, &mut result, Some(&mut copy));
        assert_eq!(result, copy);
        let elements = result.as_chunks().0.iter();
        elements.map(|bytes| T::read(*bytes)).collect()
    }

    #[test]
    fn rows_of_any_length_are_reduced_in_their_order() {
        for length in [0, 1, 7, 1023, 1024, 1025, 3000] {
            let row = |rank: usize| {
                (0..length)
                    .map(|i| (i % 13) as f32 * 0.1 + rank as f32)
                    .collect()
            };
            let rows: Vec<Vec<f32>> = (0..5).map(row).collect();
            let found = all(Reduction::Sum, Datatype::F32, &rows);
            let want: Vec<f32> = (0..length)
                .map(|i| {
                    rows[1..]
                        .iter()
                        .fold(rows[0][i], |sum: f32, row| sum + row[i])
                })
                .collect();
            assert_eq!(found, want);
        }
    }

    #[test]
    fn integers_wrap_around_and_are_compared_by_their_signs() {
        let rows = [vec![i32::MAX, -1, 5], vec![1, 1, -7]];
        assert_eq!(all(Reduction::Sum, Datatype::I32, &rows)[0], i32::MIN);
        assert_eq!(all(Reduction::Max, Datatype::I32, &rows)[1..], [1, 5]);
        assert_eq!(all(Reduction::Min, Datatype::I32, &rows)[1..], [-1, -7]);
        let rows = [vec![u64::MAX, 1 << 63], vec![1, 2]];
        assert_eq!(all(Reduction::Max, Datatype::U64, &rows), rows[0]);
        assert_eq!(all(Reduction::Prod, Datatype::U64, &rows)[1], 0);
        let rows = [vec![i64::MIN], vec![-1]];
        assert_eq!(all(Reduction::Prod, Datatype::I64, &rows), [i64::MIN]);
        let rows = [vec![1u32 << 31], vec![1]];
        assert_eq!(all(Reduction::Min, Datatype::U32, &rows), [1]);
    }

    #[test]
    fn zeros_and_nans_are_ordered_as_elsewhere() {
        let rows = [
            vec![-0.0f64, 0.0, f64::NAN, -f64::NAN, f64::INFINITY, 1.0],
            vec![0.0f64, -0.0, 1.0, 1.0, f64::NAN, -2.0],
        ];
        let bits = |row: Vec<f64>| row.into_iter().map(f64::to_bits).collect::<Vec<_>>();
        let nan = 0x7ff8_0000_0000_0000;
        let max = bits(all(Reduction::Max, Datatype::F64, &rows));
        assert_eq!(max, [0, 0, nan, nan, nan, 1f64.to_bits()]);
        let min = bits(all(Reduction::Min, Datatype::F64, &rows));
        let below = (-0.0f64).to_bits();
        assert_eq!(min, [below, below, nan, nan, nan, (-2f64).to_bits()]);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn denormals_are_numbers_on_every_thread() {
        /// Flush to zero, and denormals are zeros: as in XLA's threads.
        const WITHOUT_DENORMALS: u32 = 0x1f80 | 0x8040;
        let tiny = f32::from_bits(1);
        let rows = [vec![tiny; 9], vec![tiny; 9]];
        let before = float_state::state();
        float_state::set(WITHOUT_DENORMALS);
        let found = all(Reduction::Sum, Datatype::F32, &rows);
        let after = float_state::state();
        float_state::set(before);
        assert_eq!(after & !0x3f, WITHOUT_DENORMALS);
        assert!(found.iter().all(|x| x.to_bits() == 2));
    }

    #[test]
    fn other_elements_and_reductions_have_none() {
        assert!(Combine::of(Reduction::Sum, Datatype::BF16).is_none());
        assert!(Combine::of(Reduction::Band, Datatype::I32).is_none());
        assert!(Combine::of(Reduction::User, Datatype::F32).is_none());
    }
}
