//! What a reduction over no ranks gives: the result of `exscan` on rank 0, which MPI leaves
//! undefined (MPI 4.0, section 6.11.2).

#![forbid(unsafe_code)]

use mpi_shim_abi::Reduction;

use crate::buffer::{Buffer, ElementType};

/// The element `e` with `e op x = x`, as the bytes of `dtype`, in the first bytes of the array.
fn identity(reduction: Reduction, dtype: ElementType) -> [u8; 16] {
    use Reduction::{Band, Land, Max, Min, Prod};
    let mut bytes = [0; 16];
    let mut put = |value: &[u8]| bytes[..value.len()].copy_from_slice(value);
    macro_rules! integer {
        ($kind:ty) => {
            match reduction {
                Prod | Land => put(&<$kind>::to_le_bytes(1)),
                Min => put(&<$kind>::MAX.to_le_bytes()),
                Max => put(&<$kind>::MIN.to_le_bytes()),
                Band => put(&(!0 as $kind).to_le_bytes()),
                _ => {}
            }
        };
    }
    // One, infinity and its negative.
    let mut real = |one: &[u8], most: &[u8], least: &[u8]| match reduction {
        Prod => put(one),
        Min => put(most),
        Max => put(least),
        _ => {}
    };
    match dtype {
        ElementType::Bool => {
            if matches!(reduction, Prod | Min | Land | Band) {
                put(&[1]);
            }
        }
        ElementType::I8 => integer!(i8),
        ElementType::I16 => integer!(i16),
        ElementType::I32 => integer!(i32),
        ElementType::I64 => integer!(i64),
        ElementType::U8 => integer!(u8),
        ElementType::U16 => integer!(u16),
        ElementType::U32 => integer!(u32),
        ElementType::U64 => integer!(u64),
        ElementType::F32 | ElementType::C64 => real(
            &1f32.to_le_bytes(),
            &f32::INFINITY.to_le_bytes(),
            &f32::NEG_INFINITY.to_le_bytes(),
        ),
        ElementType::F64 | ElementType::C128 => real(
            &1f64.to_le_bytes(),
            &f64::INFINITY.to_le_bytes(),
            &f64::NEG_INFINITY.to_le_bytes(),
        ),
        // IEEE 754 binary16; bfloat16 is the upper half of binary32.
        ElementType::F16 => real(&[0x00, 0x3c], &[0x00, 0x7c], &[0x00, 0xfc]),
        ElementType::BF16 => real(&[0x80, 0x3f], &[0x80, 0x7f], &[0x80, 0xff]),
        _ => {}
    }
    bytes
}

/// Fills a result with the identity of `reduction`.
pub fn fill(result: &Buffer<'_>, reduction: Reduction) {
    let element = identity(reduction, result.dtype());
    let size = result.dtype().size();
    for start in (0..result.bytes()).step_by(size) {
        result.write(start, &element[..size]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::REDUCTIONS;

    fn filled<const N: usize>(reduction: Reduction, dtype: ElementType) -> [u8; N] {
        let mut memory = [0x55; N];
        let shape = [(N / dtype.size()) as i64];
        fill(&Buffer::over(&mut memory, dtype, &shape), reduction);
        memory
    }

    #[test]
    fn nothing_changes_what_it_is_combined_with() {
        for (reduction, name) in REDUCTIONS {
            let e = i16::from_le_bytes(filled::<2>(reduction, ElementType::I16));
            let combine = |x: i16| match name {
                "SUM" => e + x,
                "PROD" => e * x,
                "MIN" => e.min(x),
                "MAX" => e.max(x),
                "LAND" => i16::from(e != 0 && x != 0),
                "LOR" => i16::from(e != 0 || x != 0),
                "LXOR" => i16::from((e != 0) != (x != 0)),
                "BAND" => e & x,
                "BOR" => e | x,
                _ => e ^ x,
            };
            let values: &[i16] = if name.starts_with('L') {
                &[0, 1]
            } else {
                &[0, 1, -7, i16::MAX, i16::MIN]
            };
            for &x in values {
                assert_eq!(combine(x), x, "{name}");
            }
        }
    }

    #[test]
    fn of_every_kind_of_number() {
        use Reduction::{Band, Max, Min, Prod};
        assert_eq!(filled::<4>(Band, ElementType::U16), [0xff; 4]);
        assert_eq!(filled::<2>(Min, ElementType::Bool), [1, 1]);
        let least = f64::from_le_bytes(filled::<8>(Max, ElementType::F64));
        assert_eq!(least, f64::NEG_INFINITY);
        let one = filled::<16>(Prod, ElementType::C64);
        assert_eq!(one[..8], one[8..]);
        assert_eq!(one[..4], 1f32.to_le_bytes());
        assert_eq!(one[4..8], [0; 4]);
        let most = f32::from_bits(
            u32::from(u16::from_le_bytes(filled::<2>(Min, ElementType::BF16))) << 16,
        );
        assert_eq!(most, f32::INFINITY);
    }
}
