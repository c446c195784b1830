//! Floats of 8 bits: what their codes mean, and how numbers are rounded to them.
//!
//! Conversions are those of XLA and `ml_dtypes`: to nearest, ties to even; what is beyond the largest number is an infinity
//! where the format has one, and else NaN. To powers of two, halfway goes up, and zero and negative numbers are NaN.
//!
//! Sources: "OCP 8-bit Floating Point Specification" (E4M3, E5M2), "OCP Microscaling Formats"
//! (E8M0), LLVM's `APFloat` (E4M3B11FNUZ).

/// A float format of 8 bits: a sign, an exponent, a mantissa; or an exponent alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Minifloat {
    /// Stored bits of the mantissa.
    mantissa: u32,
    /// The exponent of the numbers whose exponent field is 1, and of subnormal ones.
    least_exponent: i32,
    special: Special,
}

/// What the format has beyond numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Special {
    /// Infinities and NaN at the greatest exponent, as IEEE 754 has them.
    Ieee,
    /// NaN where all bits but the sign are set.
    Nan,
    /// One NaN in the place of -0.
    NanForNegativeZero,
    /// Powers of two alone: neither a sign nor zero, NaN where all bits are set.
    Exponent,
}

const SIGN: u8 = 0x80;

impl Minifloat {
    /// `float8_e4m3fn`.
    pub const F8E4M3FN: Self = Self { mantissa: 3, least_exponent: -6, special: Special::Nan };
    /// `float8_e4m3b11fnuz`.
    pub const F8E4M3B11FNUZ: Self = Self { mantissa: 3, least_exponent: -10, special: Special::NanForNegativeZero };
    /// `float8_e5m2`.
    pub const F8E5M2: Self = Self { mantissa: 2, least_exponent: -14, special: Special::Ieee };
    /// `float8_e8m0fnu`.
    pub const F8E8M0FNU: Self = Self { mantissa: 0, least_exponent: -127, special: Special::Exponent };

    /// Stored bits of the mantissa.
    pub const fn mantissa_bits(self) -> u32 {
        self.mantissa
    }

    /// The exponent of the least number with all bits of its mantissa, and of subnormal ones.
    pub const fn least_exponent(self) -> i32 {
        self.least_exponent
    }

    /// The code of the largest number.
    const fn largest(self) -> u8 {
        match self.special {
            Special::Ieee => SIGN - 1 - (1 << self.mantissa),
            Special::Nan => SIGN - 2,
            Special::NanForNegativeZero => SIGN - 1,
            Special::Exponent => u8::MAX - 1,
        }
    }

    /// The largest number.
    pub fn most(self) -> f32 {
        self.decode(self.largest())
    }

    /// The code of a NaN.
    pub const fn nan(self) -> u8 {
        match self.special {
            Special::Ieee => SIGN - (1 << (self.mantissa - 1)),
            Special::Nan => SIGN - 1,
            Special::NanForNegativeZero => SIGN,
            Special::Exponent => u8::MAX,
        }
    }

    /// The number that a code stands for.
    pub fn decode(self, code: u8) -> f32 {
        if self.special == Special::Exponent {
            return match code {
                u8::MAX => f32::NAN,
                code => 2_f64.powi(i32::from(code) + self.least_exponent) as f32,
            };
        }
        let (negative, magnitude) = (code & SIGN != 0, code & (SIGN - 1));
        let nan = match self.special {
            Special::NanForNegativeZero => negative && magnitude == 0,
            Special::Ieee => magnitude > self.largest() + 1,
            Special::Nan | Special::Exponent => magnitude > self.largest(),
        };
        let (exponent, fraction) =
            (i32::from(magnitude >> self.mantissa), i32::from(magnitude) & ((1 << self.mantissa) - 1));
        let (leading, exponent) = if exponent == 0 { (0, 0) } else { (1 << self.mantissa, exponent - 1) };
        let value = match magnitude > self.largest() {
            true => f32::INFINITY,
            false => (fraction + leading) as f32 * power_of_two(exponent + self.least_exponent - self.mantissa as i32),
        };
        if nan {
            f32::NAN
        } else if negative {
            -value
        } else {
            value
        }
    }

    /// The code of the number nearest to `x`.
    pub fn encode(self, x: f64) -> u8 {
        if self.special == Special::Exponent {
            let code = (x * 4.0 / 3.0).log2().floor() - f64::from(self.least_exponent);
            return if x > 0.0 && code <= f64::from(self.largest()) { code.max(0.0) as u8 } else { self.nan() };
        }
        let sign = if x.is_sign_negative() { SIGN } else { 0 };
        if x.is_nan() {
            return self.nan() | if self.special == Special::NanForNegativeZero { 0 } else { sign };
        }
        let x = x.abs();
        let beyond = self.beyond() | sign;
        let exponent = (((x.to_bits() >> 52) as i32) - 1023).max(self.least_exponent);
        // In units of the last place, of which there are fewer than 2^(mantissa + 1) below the next power of two.
        let units = (x / f64::from(power_of_two(exponent.min(100) - self.mantissa as i32))).round_ties_even();
        if units > f64::from(1_u32 << 8) {
            return beyond;
        }
        let code = (exponent - self.least_exponent) as u32 * (1 << self.mantissa) + units as u32;
        match code {
            0 if self.special == Special::NanForNegativeZero => 0,
            code if code > u32::from(self.largest()) => beyond,
            code => code as u8 | sign,
        }
    }

    /// What a number beyond the largest becomes, without its sign.
    const fn beyond(self) -> u8 {
        match self.special {
            Special::Ieee => self.largest() + 1,
            Special::Nan | Special::NanForNegativeZero | Special::Exponent => self.nan(),
        }
    }

    /// The number nearest to `x`.
    pub fn round(self, x: f32) -> f32 {
        self.decode(self.encode(f64::from(x)))
    }
}

/// `2^exponent`, for exponents of normal numbers.
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMATS: [Minifloat; 3] = [Minifloat::F8E4M3FN, Minifloat::F8E4M3B11FNUZ, Minifloat::F8E5M2];

    /// By the formats' definitions, in f64 and by name; a NaN as `None`.
    fn defined(format: Minifloat, code: u32) -> Option<f64> {
        let (mantissa, bias) = match format {
            Minifloat::F8E4M3FN => (3, 7),
            Minifloat::F8E4M3B11FNUZ => (3, 11),
            _ => (2, 15),
        };
        let sign = if code & 0x80 != 0 { -1.0 } else { 1.0 };
        let (exponent, fraction) = ((code & 0x7f) >> mantissa, code & ((1 << mantissa) - 1));
        let fraction = f64::from(fraction) / f64::from(1 << mantissa);
        match format {
            Minifloat::F8E4M3FN if code & 0x7f == 0x7f => return None,
            Minifloat::F8E4M3B11FNUZ if code == 0x80 => return None,
            Minifloat::F8E5M2 if exponent == 31 => return (fraction == 0.0).then_some(sign * f64::INFINITY),
            _ => {}
        }
        Some(match exponent {
            0 => sign * fraction * 2_f64.powi(1 - bias),
            exponent => sign * (1.0 + fraction) * 2_f64.powi(exponent as i32 - bias),
        })
    }

    #[test]
    fn codes_mean_what_the_formats_define() {
        for format in FORMATS {
            for code in 0..256 {
                let value = f64::from(format.decode(code as u8));
                match defined(format, code) {
                    Some(expected) => assert_eq!(value.to_bits(), expected.to_bits(), "{format:?} {code:#x}"),
                    None => assert!(value.is_nan(), "{format:?} {code:#x}"),
                }
                if !value.is_nan() {
                    assert_eq!(u32::from(format.encode(value)), code, "{format:?} {code:#x}");
                }
            }
        }
    }

    /// Every number that lies between two neighbours, and halfway, goes to the nearer one, or to the even code.
    #[test]
    fn numbers_go_to_the_nearest_code() {
        for format in FORMATS {
            let finite = |code: u32| defined(format, code).filter(|value| value.is_finite());
            for code in (0..127_u32).filter(|&code| finite(code + 1).is_some()) {
                let (low, high) = (finite(code).unwrap(), finite(code + 1).unwrap());
                let even = code + (code & 1);
                for sign in [1.0, -1.0] {
                    let negative = if sign < 0.0 { 128 } else { 0 };
                    let encode = |x: f64| match u32::from(format.encode(sign * x)) {
                        // There is no -0.
                        0 if format.special == Special::NanForNegativeZero => negative,
                        code => code,
                    };
                    for (at, expected) in [(0.0, code), (0.25, code), (0.4999, code), (0.5, even), (0.5001, code + 1)] {
                        let x = low + at * (high - low);
                        assert_eq!(encode(x), expected | negative, "{format:?} {x}");
                    }
                }
            }
        }
    }

    /// As `ml_dtypes` 0.5 prints them.
    #[test]
    fn what_is_too_large_becomes_what_the_format_has() {
        let nan = f32::NAN;
        let cases = [500.0, 460.0, 464.0, 465.0, 1e30, f32::INFINITY, nan, -0.0, 61439.0, 61440.0, 31.0, 1e-9, -100.0];
        let tiny = 0.0;
        let inf = f32::INFINITY;
        for (format, expected) in [
            (Minifloat::F8E4M3FN, [nan, 448.0, 448.0, nan, nan, nan, nan, -0.0, nan, nan, 32.0, tiny, -96.0]),
            (Minifloat::F8E5M2, [512.0, 448.0, 448.0, 448.0, inf, inf, nan, -0.0, 57344.0, inf, 32.0, tiny, -96.0]),
            (Minifloat::F8E4M3B11FNUZ, [nan, nan, nan, nan, nan, nan, nan, 0.0, nan, nan, nan, tiny, nan]),
        ] {
            for (x, expected) in cases.into_iter().zip(expected) {
                let rounded = format.round(x);
                let same = rounded.to_bits() == expected.to_bits() || (rounded.is_nan() && expected.is_nan());
                assert!(same, "{format:?}: {x} is {rounded}, not {expected}");
            }
        }
        assert_eq!(Minifloat::F8E4M3FN.encode(-f64::NAN) & 0x7f, 0x7f);
        assert_eq!(Minifloat::F8E5M2.encode(f64::MAX), 0x7c);
        assert_eq!(Minifloat::F8E5M2.encode(f64::MIN_POSITIVE / 4.0), 0);
    }

    /// As `ml_dtypes` 0.5 has them.
    #[test]
    fn powers_of_two_have_neither_sign_nor_zero() {
        let format = Minifloat::F8E8M0FNU;
        for code in 0..255 {
            let value = f64::from(format.decode(code));
            assert_eq!((value, format.encode(value)), (2_f64.powi(i32::from(code) - 127), code));
        }
        let two = 2_f64;
        for (x, code) in [
            (0.0, 255),
            (-0.0, 255),
            (-1.0, 255),
            (f64::NAN, 255),
            (f64::INFINITY, 255),
            (1.4999, 127),
            (1.5, 128),
            (2.9, 128),
            (3.0, 129),
            (6.0, 130),
            (0.75, 127),
            (0.7499, 126),
            (1e-40, 0),
            (two.powi(-129), 0),
            (1.5 * two.powi(-127), 1),
            (1.4 * two.powi(127), 254),
            (1.5 * two.powi(127), 255),
        ] {
            assert_eq!(format.encode(x), code, "{x}");
        }
        assert!(format.decode(255).is_nan() && format.most() == 2_f32.powi(127));
    }
}
