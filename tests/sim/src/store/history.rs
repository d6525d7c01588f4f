//! What changed, for watches that begin in the past, as far as it was not compacted.
//!
//! Invariant: what is told from a revision on is complete, or nothing is told.

use super::Watched;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct History {
    changes: Vec<Watched>,
    compacted: u64,
}

impl History {
    pub(super) fn add(&mut self, changes: &[Watched]) {
        self.changes.extend_from_slice(changes);
    }

    pub(super) fn compact(&mut self, revision: u64) {
        self.compacted = revision;
        self.changes.retain(|c| c.revision > revision);
    }

    /// Everything at `from` and after it; `None`: some of it is forgotten.
    pub(super) fn since(&self, from: u64) -> Option<Vec<Watched>> {
        let first = self.changes.partition_point(|c| c.revision < from);
        (from > self.compacted).then(|| self.changes[first..].to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Key;

    #[test]
    fn a_watch_from_before_a_compaction_is_refused() {
        let change = |revision| Watched {
            key: Key::Leader,
            stored: None,
            revision,
        };
        let mut history = History::default();
        (2..6).for_each(|r| history.add(&[change(r)]));
        assert_eq!(history.since(4).map(|c| c.len()), Some(2));
        history.compact(4);
        assert!(history.since(4).is_none());
        assert_eq!(history.since(5).map(|c| c.len()), Some(1));
    }
}
