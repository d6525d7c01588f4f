//! The controllers that this proxy knows: those that it was started with, and those that its
//! topology names.
//!
//! Invariant: the ones it was started with are never forgotten, and neither, for a while, is one that
//! was named before: a controller may miss in the list just because the store was away.

use std::sync::{Arc, Mutex, PoisonError};

/// A mesh has a handful; more is a mistake that must not fill memory.
const NAMED_MAX: usize = 16;
/// Named before, and still tried, last.
const FORMER_MAX: usize = 8;

/// A handle; clones share the list.
#[derive(Clone, Debug, Default)]
pub struct Controllers {
    known: Arc<Mutex<Known>>,
}

#[derive(Debug, Default)]
struct Known {
    given: Vec<String>,
    named: Vec<String>,
    former: Vec<String>,
}

impl Controllers {
    /// Those that the process was started with.
    #[must_use]
    pub fn new(given: Vec<String>) -> Self {
        let known = Known {
            given,
            ..Known::default()
        };
        Self {
            known: Arc::new(Mutex::new(known)),
        }
    }

    /// Takes the list of a topology; an empty one says nothing.
    pub fn learn(&self, addresses: &[String]) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let named: Vec<_> = addresses.iter().take(NAMED_MAX).cloned().collect();
        if named.is_empty() || named == known.named {
            return;
        }
        let before = std::mem::replace(&mut known.named, named);
        let mut former: Vec<_> = before.into_iter().chain(known.former.drain(..)).collect();
        former.retain(|address| !known.named.contains(address));
        former.truncate(FORMER_MAX);
        known.former = former;
    }

    /// Everyone, in the order in which they are to be tried.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<String> = Vec::new();
        for address in known.named.iter().chain(&known.given).chain(&known.former) {
            if !all.contains(address) {
                all.push(address.clone());
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_of_the_start_and_those_of_before_are_still_tried() {
        let all = |of: &[&str]| -> Vec<String> { of.iter().map(|a| (*a).to_owned()).collect() };
        let controllers = Controllers::new(all(&["a:1"]));
        controllers.learn(&all(&["b:1", "c:1"]));
        controllers.learn(&all(&["b:1"]));
        controllers.learn(&[]);
        assert_eq!(controllers.addresses(), ["b:1", "a:1", "c:1"]);
        controllers.learn(&all(&["a:1", "c:1"]));
        assert_eq!(controllers.addresses(), ["a:1", "c:1", "b:1"]);
    }
}
