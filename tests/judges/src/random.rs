//! Random choices that a seed repeats: SplitMix64, so that a seed means the same for ever.

/// A stream of choices.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// Each pair of seed and stream is a stream of its own.
    pub(crate) fn new(seed: u64, stream: u64) -> Self {
        // Hashed twice: streams that begin a few steps apart would say the same.
        let mut first = Self(seed);
        let mut second = Self(first.next() ^ stream);
        Self(second.next() ^ first.next())
    }

    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Less than `end`, which is not 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).unwrap_or(u64::MAX).max(1);
        usize::try_from(self.next() % end).unwrap_or_default()
    }

    /// From `first` to `last`.
    pub(crate) fn between(&mut self, first: usize, last: usize) -> usize {
        first + self.below(last - first + 1)
    }

    pub(crate) fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}
