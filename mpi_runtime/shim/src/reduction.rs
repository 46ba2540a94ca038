//! Reductions as MPI operations: MPI's own, except where they lack the element type, or are not
//! what users of JAX expect.
//!
//! - float16 and bfloat16, which MPI does not know: in float32, one rounding per step.
//! - MIN and MAX of real numbers, whose order MPI leaves open: see [`crate::extremum`].
//! - bool: SUM is OR and PROD is AND, as in numpy; MPI has only the logical ones.
//! - MPICH 4.0 compares unsigned integers as if they were signed: MAX of 1 and 128 in `uint8` is 1.
//! - Open MPI adds integers of 8 and 16 bits with saturation, but for the last few elements of an
//!   array (`ompi/mca/op/avx/op_avx_functions.c`, open-mpi/ompi issue 8045, closed as "wontfix").
//!   numpy and JAX wrap around.
//!
//! Each of the last two kinds is tried once on this rank alone, and replaced if it fails.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use mpi::ffi;
use mpi_shim_abi::{Datatype, Reduction};

use crate::code::SUCCESS;
use crate::datatype::datatype;
use crate::extremum::Real;

type Function = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut c_int, *mut ffi::MPI_Datatype);

/// The MPI operation that reduces elements of `element`.
pub(crate) fn reduction(reduction: Reduction, element: Datatype) -> ffi::MPI_Op {
    let extremum = matches!(reduction, Reduction::Min | Reduction::Max);
    let sum = reduction == Reduction::Sum;
    match element {
        Datatype::Bool => predefined(logical(reduction)),
        Datatype::F16 => own::<f16>(reduction),
        Datatype::BF16 => own::<bf16>(reduction),
        Datatype::F32 if extremum => own::<f32>(reduction),
        Datatype::F64 if extremum => own::<f64>(reduction),
        Datatype::U8 if extremum || sum => tried::<u8>(reduction, element),
        Datatype::U16 if extremum || sum => tried::<u16>(reduction, element),
        Datatype::U32 if extremum => tried::<u32>(reduction, element),
        Datatype::U64 if extremum => tried::<u64>(reduction, element),
        Datatype::I8 if sum => tried::<i8>(reduction, element),
        Datatype::I16 if sum => tried::<i16>(reduction, element),
        _ => predefined(reduction),
    }
}

/// What numpy does with bools.
fn logical(reduction: Reduction) -> Reduction {
    match reduction {
        Reduction::Sum | Reduction::Max | Reduction::Bor => Reduction::Lor,
        Reduction::Prod | Reduction::Min | Reduction::Band => Reduction::Land,
        Reduction::Bxor => Reduction::Lxor,
        logical => logical,
    }
}

fn predefined(reduction: Reduction) -> ffi::MPI_Op {
    // SAFETY: constants of the linked MPI.
    unsafe {
        match reduction {
            Reduction::Sum => ffi::RSMPI_SUM,
            Reduction::Prod => ffi::RSMPI_PROD,
            Reduction::Min => ffi::RSMPI_MIN,
            Reduction::Max => ffi::RSMPI_MAX,
            Reduction::Land => ffi::RSMPI_LAND,
            Reduction::Lor => ffi::RSMPI_LOR,
            Reduction::Lxor => ffi::RSMPI_LXOR,
            Reduction::Band => ffi::RSMPI_BAND,
            Reduction::Bor => ffi::RSMPI_BOR,
            Reduction::Bxor => ffi::RSMPI_BXOR,
            // By its handle, and never asked for here.
            Reduction::User => std::mem::zeroed(),
        }
    }
}

/// A handle of MPI's; any thread may use it.
#[derive(Clone, Copy)]
struct Chosen(ffi::MPI_Op);
// SAFETY: MPI runs with `MPI_THREAD_MULTIPLE`, and an operation is never changed.
unsafe impl Send for Chosen {}
// SAFETY: as above.
unsafe impl Sync for Chosen {}

/// An element with reductions of ours: SUM, PROD, MIN and MAX, by their numbers.
trait Element: Copy + 'static {
    /// `right[i]` becomes the reduction of `left[i]` and `right[i]`.
    fn combine(reduction: Reduction, left: &[Self], right: &mut [Self]);
    /// The operations already chosen.
    fn chosen() -> &'static [OnceLock<Chosen>; 4];
}

macro_rules! chosen {
    () => {
        fn chosen() -> &'static [OnceLock<Chosen>; 4] {
            static CHOSEN: [OnceLock<Chosen>; 4] = [const { OnceLock::new() }; 4];
            &CHOSEN
        }
    };
}

macro_rules! integer {
    ($($kind:ty),+) => {$(
        impl Element for $kind {
            fn combine(reduction: Reduction, left: &[$kind], right: &mut [$kind]) {
                match reduction {
                    Reduction::Sum => each(left, right, |a, b| a.wrapping_add(b)),
                    Reduction::Prod => each(left, right, |a, b| a.wrapping_mul(b)),
                    Reduction::Max => each(left, right, |a, b| a.max(b)),
                    _ => each(left, right, |a, b| a.min(b)),
                }
            }
            chosen!();
        }
    )+};
}

integer!(u8, u16, u32, u64, i8, i16);

macro_rules! float {
    ($($kind:ty),+) => {$(
        impl Element for $kind {
            fn combine(reduction: Reduction, left: &[$kind], right: &mut [$kind]) {
                match reduction {
                    Reduction::Sum => each(left, right, |a, b| a + b),
                    Reduction::Prod => each(left, right, |a, b| a * b),
                    Reduction::Max => Self::extremum::<true>(left, right),
                    _ => Self::extremum::<false>(left, right),
                }
            }
            chosen!();
        }
    )+};
}

float!(f32, f64);

impl Element for f16 {
    fn combine(reduction: Reduction, left: &[f16], right: &mut [f16]) {
        match reduction {
            Reduction::Max => return Self::extremum::<true>(left, right),
            Reduction::Min => return Self::extremum::<false>(left, right),
            _ => {}
        }
        const BLOCK: usize = 512;
        let (mut a, mut b) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
        for (left, right) in left.chunks(BLOCK).zip(right.chunks_mut(BLOCK)) {
            let (a, b) = (&mut a[..left.len()], &mut b[..left.len()]);
            left.convert_to_f32_slice(a);
            right.convert_to_f32_slice(b);
            f32::combine(reduction, a, b);
            right.convert_from_f32_slice(b);
        }
    }
    chosen!();
}

impl Element for bf16 {
    fn combine(reduction: Reduction, left: &[bf16], right: &mut [bf16]) {
        #[cfg(target_arch = "x86_64")]
        {
            /// The same loops, compiled for wider vectors.
            #[target_feature(enable = "avx2")]
            fn wide(reduction: Reduction, left: &[bf16], right: &mut [bf16]) {
                combine_bf16(reduction, left, right);
            }
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has what `wide` needs.
                return unsafe { wide(reduction, left, right) };
            }
        }
        combine_bf16(reduction, left, right);
    }
    chosen!();
}

#[inline(always)]
fn combine_bf16(reduction: Reduction, left: &[bf16], right: &mut [bf16]) {
    #[inline(always)]
    fn in_f32(left: &[bf16], right: &mut [bf16], function: impl Fn(f32, f32) -> f32) {
        each(left, right, |a, b| round(function(widen(a), widen(b))));
    }
    match reduction {
        Reduction::Sum => in_f32(left, right, |a, b| a + b),
        Reduction::Prod => in_f32(left, right, |a, b| a * b),
        Reduction::Max => bf16::extremum::<true>(left, right),
        _ => bf16::extremum::<false>(left, right),
    }
}

/// A bfloat16 is the upper half of a float32.
#[inline(always)]
fn widen(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// To the nearest, ties to even; without branches, so that it is vectorised (`half` has some).
#[inline(always)]
fn round(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
}

#[inline(always)]
fn each<T: Copy>(left: &[T], right: &mut [T], function: impl Fn(T, T) -> T) {
    for (a, b) in left.iter().zip(right) {
        *b = function(*a, *b);
    }
}

/// Our reduction, made at first use.
fn own<T: Element>(reduction: Reduction) -> ffi::MPI_Op {
    let Some(chosen) = T::chosen().get(reduction as usize) else {
        // The engine refuses the others by name before.
        return predefined(reduction);
    };
    chosen.get_or_init(|| Chosen(create::<T>(reduction))).0
}

/// MPI's reduction if it is right where others are known to be wrong, else ours.
fn tried<T: Element + Limits>(reduction: Reduction, element: Datatype) -> ffi::MPI_Op {
    let Some(chosen) = T::chosen().get(reduction as usize) else {
        return predefined(reduction);
    };
    chosen
        .get_or_init(|| {
            let own = predefined(reduction);
            let right = is_right::<T>(own, datatype(element), reduction);
            Chosen(if right { own } else { create::<T>(reduction) })
        })
        .0
}

fn create<T: Element>(reduction: Reduction) -> ffi::MPI_Op {
    let function: Function = match reduction {
        Reduction::Sum => apply::<T, { Reduction::Sum as u32 }>,
        Reduction::Prod => apply::<T, { Reduction::Prod as u32 }>,
        Reduction::Min => apply::<T, { Reduction::Min as u32 }>,
        _ => apply::<T, { Reduction::Max as u32 }>,
    };
    // No operation at all, which MPI refuses by name (MPI_ERR_OP).
    // SAFETY: a handle is an integer or a pointer, for which zero bytes are valid.
    let none = unsafe { std::mem::zeroed() };
    let mut op = none;
    // SAFETY: MPI is running; the function lives as long as the process.
    let code = unsafe { ffi::MPI_Op_create(Some(function), 1, &mut op) };
    if code == SUCCESS { op } else { none }
}

/// The values that tell a comparison without a sign from one with, and a sum that wraps around from
/// one that saturates.
trait Limits: Copy + PartialEq {
    const ONE: Self;
    const LARGEST: Self;
    const SMALLEST: Self;
}

macro_rules! limits {
    ($($kind:ty),+) => {$(
        impl Limits for $kind {
            const ONE: Self = 1;
            const LARGEST: Self = Self::MAX;
            const SMALLEST: Self = Self::MIN;
        }
    )+};
}

limits!(u8, u16, u32, u64, i8, i16);

/// More bytes than in the widest vectors, of each width: what MPI does with vectors may differ from
/// what it does with the elements that are left.
const TRIED: usize = 127;

/// Whether MPI's own reduction of the largest number and 1 is right.
fn is_right<T: Limits>(op: ffi::MPI_Op, kind: ffi::MPI_Datatype, reduction: Reduction) -> bool {
    let (mine, mut result) = ([T::LARGEST; TRIED], [T::ONE; TRIED]);
    // SAFETY: as many elements in each buffer; nothing leaves this rank (MPI 4.0, section 6.9.7).
    let code = unsafe {
        ffi::MPI_Reduce_local(
            mine.as_ptr().cast(),
            result.as_mut_ptr().cast(),
            TRIED as c_int,
            kind,
            op,
        )
    };
    let right = match reduction {
        Reduction::Sum => T::SMALLEST,
        Reduction::Max => T::LARGEST,
        _ => T::ONE,
    };
    code == SUCCESS && result == [right; TRIED]
}

unsafe extern "C" fn apply<T: Element, const REDUCTION: u32>(
    input: *mut c_void,
    output: *mut c_void,
    length: *mut c_int,
    _: *mut ffi::MPI_Datatype,
) {
    let reduction = match REDUCTION {
        0 => Reduction::Sum,
        1 => Reduction::Prod,
        2 => Reduction::Min,
        _ => Reduction::Max,
    };
    // SAFETY: MPI passes two vectors of `length` elements that do not overlap, aligned for their
    // type (MPI 4.0, section 6.9.5): users' arrays, or memory MPI allocated for such.
    unsafe {
        let length = usize::try_from(*length).unwrap_or(0);
        if length > 0 {
            let left = std::slice::from_raw_parts(input.cast::<T>(), length);
            let right = std::slice::from_raw_parts_mut(output.cast::<T>(), length);
            T::combine(reduction, left, right);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_contract() {
        let numbers = [
            Reduction::Sum,
            Reduction::Prod,
            Reduction::Min,
            Reduction::Max,
        ];
        for (number, reduction) in numbers.into_iter().enumerate() {
            assert_eq!(reduction as usize, number);
        }
    }

    #[test]
    fn not_a_number_is_passed_on() {
        for reduction in [Reduction::Min, Reduction::Max] {
            let left = [f32::NAN, 1.0, 2.0];
            let mut right = [3.0, f32::NAN, 1.0];
            f32::combine(reduction, &left, &mut right);
            assert!(right[0].is_nan() && right[1].is_nan() && !right[2].is_nan());
            let mut right = [3.0, f32::NAN, 1.0].map(bf16::from_f32);
            bf16::combine(reduction, &left.map(bf16::from_f32), &mut right);
            assert!(right[0].is_nan() && right[1].is_nan() && !right[2].is_nan());
        }
    }

    #[test]
    fn sums_of_small_integers_wrap_around() {
        fn check<T: Element + Limits + std::fmt::Debug>() {
            let mut right = [T::ONE; TRIED];
            T::combine(Reduction::Sum, &[T::LARGEST; TRIED], &mut right);
            assert_eq!(right, [T::SMALLEST; TRIED]);
        }
        check::<u8>();
        check::<u16>();
        check::<i8>();
        check::<i16>();
    }

    #[test]
    fn half_precision_is_rounded_once() {
        let left = vec![bf16::from_f32(1.0); 1000];
        let mut right = vec![bf16::from_f32(1.0 / 256.0); 1000];
        bf16::combine(Reduction::Sum, &left, &mut right);
        assert!(
            right
                .iter()
                .all(|&x| x == bf16::from_f32(1.0 + 1.0 / 256.0))
        );
        for bits in 0..=u16::MAX {
            let x = bf16::from_bits(bits);
            for step in [0.0, 1e-3, 2.0f32.powi(-8), 2.0f32.powi(-9) * 3.0, 0.999] {
                let wide = f32::from(x) * (1.0 + step);
                let (ours, theirs) = (round(wide), bf16::from_f32(wide));
                assert!(ours == theirs || ours.is_nan() && theirs.is_nan(), "{wide}");
            }
        }
        let (left, mut right) = ([f16::MAX], [f16::MAX]);
        f16::combine(Reduction::Sum, &left, &mut right);
        assert_eq!(right[0], f16::INFINITY);
    }
}
