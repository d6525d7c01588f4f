//! How a task ends whose parts have not all come to where they should.
//!
//! Invariant: with some parts changed and others not an operator is asked, and hears the reason of each;
//! with none changed there is nothing to decide.

use crate::spec::State;

/// Where it leads that only `done` parts are done: `words` say how many, and what the others do; `why`
/// has a reason of each that stands for itself.
pub(crate) fn fell_short(
    done: usize,
    cancelled: bool,
    words: &str,
    mut why: Vec<String>,
) -> (State, String) {
    why.dedup();
    let why = why.join("; ");
    match (done, cancelled) {
        (0, true) => (State::Cancelled, why),
        (0, false) => (State::RolledBack, why),
        _ => {
            let words = format!("{words}; retry goes on with those: {why}");
            (State::NeedsOperator, words)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operator_is_asked_only_when_some_are_done() {
        let why = || vec!["a".to_owned(), "a".to_owned(), "b".to_owned()];
        let none = fell_short(0, false, "0 of 3", why());
        assert_eq!(none, (State::RolledBack, "a; b".to_owned()));
        assert_eq!(fell_short(0, true, "0 of 3", why()).0, State::Cancelled);
        let (state, words) = fell_short(1, true, "1 of 3 run it", why());
        assert_eq!(state, State::NeedsOperator);
        assert_eq!(words, "1 of 3 run it; retry goes on with those: a; b");
    }
}
