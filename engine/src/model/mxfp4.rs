//! Numbers of 4 bits that share a scale, as gpt-oss's experts are stored: MXFP4 of the OCP Microscaling Formats (v1.0). A number
//! has a sign, two bits of exponent and one of mantissa; 32 of them are times one power of two.

/// Numbers that share a scale.
pub(super) const BLOCK: usize = 32;
/// Bytes of a block.
pub(super) const BYTES: usize = BLOCK / 2;

/// Every number without a sign.
const NUMBERS: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The numbers of a block, of a byte the lower half first, times `2^(scale - 127)`. Scale 255 stands for NaN.
pub(super) fn decoded(block: &[u8; BYTES], scale: u8) -> impl Iterator<Item = f32> {
    let factor = if scale == u8::MAX { f32::NAN } else { (f32::from(scale) - 127.0).exp2() };
    block.iter().flat_map(|byte| [byte & 0xf, byte >> 4]).map(move |code| {
        let magnitude = NUMBERS[usize::from(code & 7)] * factor;
        if code & 8 == 0 { magnitude } else { -magnitude }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_decoded() {
        let mut block = [0; BYTES];
        (block[0], block[1], block[15]) = (0x21, 0xf7, 0x9c);
        let of = |scale| decoded(&block, scale).collect::<Vec<_>>();
        let ones = of(127);
        assert_eq!((ones.len(), &ones[..5], &ones[30..]), (32, &[0.5, 1.0, 6.0, -6.0, 0.0][..], &[-2.0, -0.5][..]));
        assert_eq!(of(120)[2], 6.0 / 128.0);
        // The least scale is no normal number of f32.
        assert_eq!(f64::from(of(0)[1]), f64::exp2(-127.0));
        assert!(of(255).iter().all(|number| number.is_nan()));
    }
}
