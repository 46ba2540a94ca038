//! Reductions of arrays of one process, of every element type that has them, with the results that
//! MPI's have here (`mpi_runtime/shim/src/reduction.rs`).

#![forbid(unsafe_code)]

use half::{bf16, f16};
use mpi_shim_abi::{Datatype, Reduction};

use super::combine::Combine;
use crate::buffer::{Class, ElementType};
use crate::operation::reduction_name;

/// `onto` becomes the reduction of itself and `other`, in that order, element by element. Both are
/// arrays of that element type and of the same length.
///
/// # Errors
/// If such elements have no such reduction.
pub fn reduce(
    reduction: Reduction,
    element: ElementType,
    onto: &mut [u8],
    other: &[u8],
) -> Result<(), String> {
    let known = element
        .datatype()
        .filter(|_| element.class() != Class::Opaque);
    known
        .and_then(|datatype| of_datatype(reduction, datatype, onto, other))
        .ok_or_else(|| {
            format!(
                "{} has no reduction {}",
                element.name(),
                reduction_name(reduction)
            )
        })
}

fn of_datatype(
    reduction: Reduction,
    element: Datatype,
    onto: &mut [u8],
    other: &[u8],
) -> Option<()> {
    if let Some(combine) = Combine::of(reduction, element) {
        combine.onto(onto, other);
        return Some(());
    }
    match element {
        Datatype::Bool => logical(reduction, onto, other),
        Datatype::I8 => i8::reduce(reduction, onto, other),
        Datatype::I16 => i16::reduce(reduction, onto, other),
        Datatype::I32 => i32::reduce(reduction, onto, other),
        Datatype::I64 => i64::reduce(reduction, onto, other),
        Datatype::U8 => u8::reduce(reduction, onto, other),
        Datatype::U16 => u16::reduce(reduction, onto, other),
        Datatype::U32 => u32::reduce(reduction, onto, other),
        Datatype::U64 => u64::reduce(reduction, onto, other),
        Datatype::F16 => in_f32(reduction, onto, other, f16::from_le_bytes, f16::to_le_bytes),
        Datatype::BF16 => in_f32(
            reduction,
            onto,
            other,
            bf16::from_le_bytes,
            bf16::to_le_bytes,
        ),
        Datatype::C64 => complex(reduction, onto, other, f32::from_le_bytes, f32::to_le_bytes),
        Datatype::C128 => complex(reduction, onto, other, f64::from_le_bytes, f64::to_le_bytes),
        Datatype::F32 | Datatype::F64 => None,
    }
}

/// Each element of `onto`, of `N` bytes, becomes that function of itself and the other one.
fn each<const N: usize>(
    onto: &mut [u8],
    other: &[u8],
    function: impl Fn([u8; N], [u8; N]) -> [u8; N],
) -> Option<()> {
    for (a, b) in onto.as_chunks_mut().0.iter_mut().zip(other.as_chunks().0) {
        *a = function(*a, *b);
    }
    Some(())
}

/// What numpy does with bools.
fn logical(reduction: Reduction, onto: &mut [u8], other: &[u8]) -> Option<()> {
    let function: fn(bool, bool) -> bool = match reduction {
        Reduction::Sum | Reduction::Max | Reduction::Bor | Reduction::Lor => |a, b| a | b,
        Reduction::Prod | Reduction::Min | Reduction::Band | Reduction::Land => |a, b| a & b,
        Reduction::Bxor | Reduction::Lxor => |a, b| a ^ b,
        Reduction::User => return None,
    };
    each(onto, other, |[a], [b]| [function(a != 0, b != 0).into()])
}

trait Integer {
    fn reduce(reduction: Reduction, onto: &mut [u8], other: &[u8]) -> Option<()>;
}

macro_rules! integers {
    ($($kind:ty),+) => {$(
        impl Integer for $kind {
            fn reduce(reduction: Reduction, onto: &mut [u8], other: &[u8]) -> Option<()> {
                let function: fn($kind, $kind) -> $kind = match reduction {
                    Reduction::Sum => |a, b| a.wrapping_add(b),
                    Reduction::Prod => |a, b| a.wrapping_mul(b),
                    Reduction::Min => |a, b| a.min(b),
                    Reduction::Max => |a, b| a.max(b),
                    Reduction::Band => |a, b| a & b,
                    Reduction::Bor => |a, b| a | b,
                    Reduction::Bxor => |a, b| a ^ b,
                    Reduction::Land => |a, b| (a != 0 && b != 0).into(),
                    Reduction::Lor => |a, b| (a != 0 || b != 0).into(),
                    Reduction::Lxor => |a, b| ((a != 0) != (b != 0)).into(),
                    Reduction::User => return None,
                };
                each(onto, other, |a, b| {
                    function(<$kind>::from_ne_bytes(a), <$kind>::from_ne_bytes(b)).to_ne_bytes()
                })
            }
        }
    )+};
}

integers!(i8, i16, i32, i64, u8, u16, u32, u64);

/// Real numbers of 16 bits: in float32, one rounding per step.
fn in_f32<T: Copy + Into<f32> + FromF32>(
    reduction: Reduction,
    onto: &mut [u8],
    other: &[u8],
    read: fn([u8; 2]) -> T,
    bytes: fn(T) -> [u8; 2],
) -> Option<()> {
    let combine = Combine::of(reduction, Datatype::F32)?;
    let wide = |narrow: &[u8]| -> Vec<u8> {
        let elements = narrow.as_chunks().0.iter();
        elements
            .flat_map(|&element| read(element).into().to_ne_bytes())
            .collect()
    };
    let (mut left, right) = (wide(onto), wide(other));
    combine.onto(&mut left, &right);
    for (to, &from) in onto.as_chunks_mut().0.iter_mut().zip(left.as_chunks().0) {
        *to = bytes(T::from_f32(f32::from_ne_bytes(from)));
    }
    Some(())
}

trait FromF32 {
    fn from_f32(value: f32) -> Self;
}

impl FromF32 for f16 {
    fn from_f32(value: f32) -> f16 {
        f16::from_f32(value)
    }
}

impl FromF32 for bf16 {
    fn from_f32(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
}

/// Complex numbers, a real and an imaginary part of `N` bytes each.
fn complex<T, const N: usize>(
    reduction: Reduction,
    onto: &mut [u8],
    other: &[u8],
    read: fn([u8; N]) -> T,
    bytes: fn(T) -> [u8; N],
) -> Option<()>
where
    T: Copy + std::ops::Add<Output = T> + std::ops::Sub<Output = T> + std::ops::Mul<Output = T>,
{
    let is_sum = match reduction {
        Reduction::Sum => true,
        Reduction::Prod => false,
        _ => return None,
    };
    let left = onto.as_chunks_mut::<N>().0.as_chunks_mut::<2>().0;
    let right = other.as_chunks::<N>().0.as_chunks::<2>().0;
    for (to, from) in left.iter_mut().zip(right) {
        let ([a, b], [c, d]) = (to.map(read), from.map(read));
        let sum = match is_sum {
            true => [a + c, b + d],
            false => [a * c - b * d, a * d + b * c],
        };
        *to = sum.map(bytes);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_its_reductions() {
        let (one, two) = (f16::from_f32(1.5), f16::from_f32(2.0));
        let mut onto = one.to_le_bytes();
        reduce(
            Reduction::Sum,
            ElementType::F16,
            &mut onto,
            &two.to_le_bytes(),
        )
        .unwrap();
        assert_eq!(f16::from_le_bytes(onto), f16::from_f32(3.5));
        let mut onto = bf16::NAN.to_le_bytes();
        reduce(Reduction::Max, ElementType::BF16, &mut onto, &[0, 0]).unwrap();
        assert!(bf16::from_le_bytes(onto).is_nan());
        let mut onto = [1f32, 2.0].map(f32::to_le_bytes).concat();
        let other = [3f32, 4.0].map(f32::to_le_bytes).concat();
        reduce(Reduction::Prod, ElementType::C64, &mut onto, &other).unwrap();
        assert_eq!(onto, [-5f32, 10.0].map(f32::to_le_bytes).concat());
        let mut onto = [1u8, 0, 1];
        reduce(Reduction::Sum, ElementType::Bool, &mut onto, &[1, 1, 0]).unwrap();
        assert_eq!(onto, [1, 1, 1]);
        let mut onto = [200u8, 6];
        reduce(Reduction::Sum, ElementType::U8, &mut onto, &[100, 1]).unwrap();
        assert_eq!(onto, [44, 7]);
        reduce(Reduction::Band, ElementType::U8, &mut onto, &[4, 3]).unwrap();
        assert_eq!(onto, [4, 3]);
    }

    #[test]
    fn what_has_none_is_refused() {
        assert!(reduce(Reduction::Band, ElementType::F32, &mut [0; 4], &[0; 4]).is_err());
        assert!(reduce(Reduction::Max, ElementType::C64, &mut [0; 8], &[0; 8]).is_err());
    }
}
