//! MIN and MAX of real numbers, with one answer for every pair of bits, in whatever order MPI
//! combines them: ranks that each reduce for themselves, as MPICH's do, get the same bits.
//!
//! - They are ordered by value and then sign: -0.0 is below 0.0 (IEEE 754-2019, section 9.6).
//! - NaN is passed on, as `jnp.minimum` does; all of them become the same one.
//! - Denormals are compared too. They are compared as integers, since threads of XLA's take
//!   denormals for zero, and others do not.

use half::{bf16, f16};

/// A real number that can be ordered by its bits.
pub(crate) trait Real: Copy {
    /// `right[i]` becomes the larger of `left[i]` and `right[i]`, or the smaller.
    fn extremum<const LARGER: bool>(left: &[Self], right: &mut [Self]);
}

macro_rules! real {
    ($($kind:ty: $signed:ty, $infinity:expr, $nan:expr;)+) => {$(
        impl Real for $kind {
            fn extremum<const LARGER: bool>(left: &[$kind], right: &mut [$kind]) {
                const INFINITY: $signed = <$kind>::to_bits($infinity) as $signed;
                /// The quiet NaN with no sign and no payload.
                const NAN: $signed = <$kind>::to_bits($nan) as $signed;

                /// The bits as a number that grows with the value: all but the sign of a negative
                /// one are turned. Twice is the bits again.
                #[inline(always)]
                fn key(bits: $signed) -> $signed {
                    bits ^ ((bits >> (<$signed>::BITS - 1)) & <$signed>::MAX)
                }

                #[inline(always)]
                fn is_nan(bits: $signed) -> bool {
                    bits & <$signed>::MAX > INFINITY
                }

                #[inline(always)]
                fn all<const LARGER: bool>(left: &[$kind], right: &mut [$kind]) {
                    for (a, b) in left.iter().zip(right) {
                        let (x, y) = (a.to_bits() as $signed, b.to_bits() as $signed);
                        let (p, q) = (key(x), key(y));
                        let chosen = if (p > q) == LARGER { x } else { y };
                        let bits = if is_nan(x) | is_nan(y) { NAN } else { chosen };
                        *b = <$kind>::from_bits(bits as _);
                    }
                }

                #[cfg(target_arch = "x86_64")]
                {
                    /// The same loop, compiled for wider vectors.
                    #[target_feature(enable = "avx2")]
                    fn wide<const LARGER: bool>(left: &[$kind], right: &mut [$kind]) {
                        all::<LARGER>(left, right);
                    }
                    if is_x86_feature_detected!("avx2") {
                        // SAFETY: the processor has what `wide` needs.
                        return unsafe { wide::<LARGER>(left, right) };
                    }
                }
                all::<LARGER>(left, right);
            }
        }
    )+};
}

real! {
    f16: i16, f16::INFINITY, f16::NAN;
    bf16: i16, bf16::INFINITY, bf16::NAN;
    f32: i32, f32::INFINITY, f32::from_bits(0x7fc0_0000);
    f64: i64, f64::INFINITY, f64::from_bits(0x7ff8_0000_0000_0000);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the larger and the smaller of two numbers are, each in both orders, as bits.
    fn both(a: f32, b: f32) -> [u32; 4] {
        let one = |larger: bool, a: f32, b: f32| {
            let mut right = [b];
            match larger {
                true => f32::extremum::<true>(&[a], &mut right),
                false => f32::extremum::<false>(&[a], &mut right),
            }
            right[0].to_bits()
        };
        [
            one(true, a, b),
            one(true, b, a),
            one(false, a, b),
            one(false, b, a),
        ]
    }

    #[test]
    fn the_order_of_two_numbers_does_not_matter() {
        let tiny = f32::from_bits(1);
        // From the smallest on.
        let numbers = [
            f32::NEG_INFINITY,
            f32::MIN,
            -1.0,
            -f32::MIN_POSITIVE,
            -tiny,
            -0.0,
            0.0,
            tiny,
            f32::from_bits(2),
            f32::MIN_POSITIVE,
            1.0,
            f32::MAX,
            f32::INFINITY,
        ];
        for (i, &small) in numbers.iter().enumerate() {
            for &large in &numbers[i..] {
                let (small, large) = (small.to_bits(), large.to_bits());
                let found = both(f32::from_bits(small), f32::from_bits(large));
                assert_eq!(found, [large, large, small, small]);
            }
        }
    }

    #[test]
    fn every_nan_becomes_one() {
        for bits in [0x7fc0_0000, 0xffc0_0000, 0x7f80_0001, 0xffff_ffff] {
            for other in [1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
                assert_eq!(both(f32::from_bits(bits), other), [0x7fc0_0000; 4]);
            }
        }
    }

    #[test]
    fn all_widths_are_ordered() {
        fn check<T: Real + PartialEq + std::fmt::Debug>(numbers: [T; 4], bits: fn(T) -> u64) {
            let [low, below_zero, zero, high] = numbers;
            let left = [low, zero, below_zero, high].repeat(33);
            let mut right = [zero, below_zero, zero, low].repeat(33);
            T::extremum::<true>(&left, &mut right);
            let want = [zero, zero, zero, high].repeat(33);
            let as_bits = |all: &[T]| all.iter().map(|&x| bits(x)).collect::<Vec<_>>();
            assert_eq!(as_bits(&right), as_bits(&want));
        }
        check([-2.0f64, -0.0, 0.0, 3.0], |x| x.to_bits());
        let half = |x: f32| f16::from_f32(x);
        check([half(-2.0), half(-0.0), half(0.0), half(3.0)], |x| {
            x.to_bits().into()
        });
        let half = |x: f32| bf16::from_f32(x);
        check([half(-2.0), half(-0.0), half(0.0), half(3.0)], |x| {
            x.to_bits().into()
        });
    }
}
