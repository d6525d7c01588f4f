//! Buffers of a worker, last in first out: the one that was used last is still in the cache.
//!
//! Invariant: what the pool keeps is bounded by [`KEPT_MAX`] buffers of [`BUFFER_BYTES_MAX`].

/// A larger buffer served one large reply or a backlog; its memory goes back at once.
const BUFFER_BYTES_MAX: usize = 64 * 1024;
/// About what a turn of a busy worker has in use at once.
const KEPT_MAX: usize = 256;

#[derive(Debug, Default)]
pub struct Pool {
    buffers: Vec<Vec<u8>>,
}

impl Pool {
    /// An empty buffer.
    #[inline]
    pub fn take(&mut self) -> Vec<u8> {
        self.buffers.pop().unwrap_or_default()
    }

    /// Gives a buffer back; its contents are forgotten.
    #[inline]
    pub fn give(&mut self, mut buffer: Vec<u8>) {
        if buffer.capacity() != 0
            && buffer.capacity() <= BUFFER_BYTES_MAX
            && self.buffers.len() < KEPT_MAX
        {
            buffer.clear();
            self.buffers.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_buffers_are_not_kept() {
        let mut pool = Pool::default();
        pool.give(Vec::with_capacity(BUFFER_BYTES_MAX + 1));
        assert_eq!(pool.take().capacity(), 0);
        pool.give(vec![1; 100]);
        let again = pool.take();
        assert!(again.is_empty() && again.capacity() >= 100);
    }
}
