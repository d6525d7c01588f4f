//! The registers of a HyperLogLog: read from a string value, merged, counted.
//!
//! Invariant: the count is an engine's to the last digit (the estimator of Otmar Ertl, "New
//! cardinality estimation algorithms for HyperLogLog sketches", arXiv:1702.01284), and a string
//! that an engine would not take for a HyperLogLog is refused for the same reason.

/// 2^14 registers of 6 bits.
const COUNT: usize = 1 << 14;
/// Largest value of a register: the 50 other bits of the hash, all zero, and one.
const VALUE_MAX: usize = 51;
const HEADER: usize = 16;
const DENSE: usize = HEADER + COUNT * 6 / 8;
/// 1 / (2 ln 2).
const ALPHA: f64 = 0.721_347_520_444_481_7;

/// Why a string is no HyperLogLog.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Invalid {
    #[error("WRONGTYPE Key is not a valid HyperLogLog string value.")]
    Form,
    #[error("INVALIDOBJ Corrupted HLL object detected")]
    Corrupted,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Registers(Vec<u8>);

impl Default for Registers {
    fn default() -> Self {
        Self(vec![0; COUNT])
    }
}

impl Registers {
    /// Takes a string value in: each register is the larger of the two.
    pub(super) fn merge(&mut self, value: &[u8]) -> Result<(), Invalid> {
        let (header, body) = value.split_at_checked(HEADER).ok_or(Invalid::Form)?;
        if !header.starts_with(b"HYLL") {
            return Err(Invalid::Form);
        }
        match header[4] {
            0 if value.len() == DENSE => self.merge_dense(body),
            1 => return self.merge_sparse(body),
            _ => return Err(Invalid::Form),
        }
        Ok(())
    }

    fn merge_dense(&mut self, body: &[u8]) {
        // Four registers in three bytes, lowest bits first.
        for (four, bytes) in self.0.chunks_exact_mut(4).zip(body.chunks_exact(3)) {
            let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], 0]);
            for (at, register) in four.iter_mut().enumerate() {
                *register = (*register).max((bits >> (6 * at)) as u8 & 63);
            }
        }
    }

    /// Runs: `00llllll` and `01llllll llllllll` of zeros, `1vvvvvll` of a value; lengths and values
    /// are one more than written.
    fn merge_sparse(&mut self, body: &[u8]) -> Result<(), Invalid> {
        let (mut at, mut bytes) = (0, body.iter().copied().map(usize::from));
        while let Some(byte) = bytes.next() {
            let (len, value) = match byte >> 6 {
                0 => ((byte & 63) + 1, 0),
                1 => {
                    let low = bytes.next().ok_or(Invalid::Corrupted)?;
                    ((((byte & 63) << 8) | low) + 1, 0)
                }
                _ => ((byte & 3) + 1, ((byte >> 2) & 31) + 1),
            };
            let run = self.0.get_mut(at..at + len).ok_or(Invalid::Corrupted)?;
            for register in run {
                *register = (*register).max(value as u8);
            }
            at += len;
        }
        if at == COUNT {
            Ok(())
        } else {
            Err(Invalid::Corrupted)
        }
    }

    /// The estimated number of elements.
    pub(super) fn count(&self) -> i64 {
        let mut with = [0_u32; 64];
        for register in &self.0 {
            with[usize::from(*register)] += 1;
        }
        let m = COUNT as f64;
        let mut z = m * tau((m - f64::from(with[VALUE_MAX])) / m);
        for count in with[1..VALUE_MAX].iter().rev() {
            z = (z + f64::from(*count)) * 0.5;
        }
        z += m * sigma(f64::from(with[0]) / m);
        (ALPHA * m * m / z).round() as i64
    }
}

/// x + x² + 2x⁴ + 4x⁸ + …
fn sigma(mut x: f64) -> f64 {
    if x == 1.0 {
        return f64::INFINITY;
    }
    let (mut sum, mut factor) = (x, 1.0);
    loop {
        x *= x;
        let before = sum;
        sum += x * factor;
        factor += factor;
        if sum == before {
            return sum;
        }
    }
}

/// (1 - x - (1-x^½)²/2 - (1-x^¼)²/4 - …) / 3
fn tau(mut x: f64) -> f64 {
    if x == 0.0 || x == 1.0 {
        return 0.0;
    }
    let (mut sum, mut factor) = (1.0 - x, 1.0);
    loop {
        x = x.sqrt();
        let before = sum;
        factor *= 0.5;
        sum -= (1.0 - x).powf(2.0) * factor;
        if sum == before {
            return sum / 3.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sparse(body: &[u8]) -> Vec<u8> {
        [b"HYLL\x01\0\0\0".as_slice(), &[0; 8], body].concat()
    }

    #[test]
    fn runs_fill_all_registers_or_the_value_is_corrupted() {
        let mut registers = Registers::default();
        let empty = sparse(&[0x7f, 0xff]); // 16384 zeros
        assert_eq!(registers.merge(&empty), Ok(()));
        assert_eq!(registers.count(), 0);
        // One register with value 3, and 16383 zeros.
        assert_eq!(registers.merge(&sparse(&[0x88, 0x7f, 0xfe])), Ok(()));
        assert_eq!(registers.count(), 1);
        for body in [&[0x7f_u8, 0xfe][..], &[0x7f, 0xff, 0x00], &[0x7f], &[]] {
            let merged = registers.merge(&sparse(body));
            assert_eq!(merged, Err(Invalid::Corrupted), "{body:?}");
        }
    }

    #[test]
    fn other_strings_are_no_hyperloglogs() {
        let mut registers = Registers::default();
        let mut dense = sparse(&[0; DENSE - HEADER]);
        dense[4] = 0;
        assert_eq!(registers.merge(&dense), Ok(()));
        dense.pop();
        assert_eq!(registers.merge(&dense), Err(Invalid::Form));
        let mut unknown = sparse(&[0x7f, 0xff]);
        unknown[4] = 2;
        for value in [b"".as_slice(), b"HYLL", b"hello, this is a text", &unknown] {
            assert_eq!(registers.merge(value), Err(Invalid::Form));
        }
    }

    #[test]
    fn four_registers_lie_in_three_bytes() {
        let mut dense = sparse(&[0; DENSE - HEADER]);
        dense[4] = 0;
        // 1, 2, 3, 4 from the lowest bits on.
        dense[HEADER..HEADER + 3].copy_from_slice(&[0b1000_0001, 0b0011_0000, 0b0001_0000]);
        let mut registers = Registers::default();
        registers.merge(&dense).unwrap();
        assert_eq!(registers.0[..5], [1, 2, 3, 4, 0]);
    }
}
