//! Which part of a former primary's history its successors do not have: the pure half of keeping it.
//!
//! Invariant: what is certainly in the successors' history is never called lost, and what may not be
//! is never passed over in silence: when no failover that is remembered tells of this history, all
//! that the process has written itself counts, and is said not to be known.

use slotmesh_proto::{agent::v1::NodeSpec, store::v1::Departure};

/// Redis names an unknown history so.
const NO_HISTORY: u8 = b'0';

/// A process's own word on its history.
#[derive(Debug, Clone, Copy, Default)]
pub struct History<'a> {
    /// Which it writes.
    pub replid: &'a str,
    /// Its last byte.
    pub offset: u64,
    /// Which it has gone on from, if any.
    pub replid2: &'a str,
    /// The first byte that it has written itself, if it has gone on from another one.
    pub second_offset: u64,
}

/// What would be lost by following.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tail {
    /// The first byte that the successors do not have, or may not have.
    pub from: u64,
    /// A remembered failover says that this is where the histories depart.
    pub known: bool,
}

/// What the process has beyond its successors, who are at `spec`'s epoch. `stood`: the epoch at which
/// it last agreed with the record, if it ever did.
pub fn tail(spec: &NodeSpec, history: &History<'_>, stood: Option<u64>) -> Option<Tail> {
    let departures = departures(spec);
    let until = |replid: &str| {
        let of_it = departures.iter().filter(|d| d.replid == replid);
        of_it.map(|d| d.offset).min()
    };
    // Only an engine that has gone on from another history knows a second one.
    let goes_on = history.second_offset > 0 && history.replid2.bytes().any(|b| b != NO_HISTORY);
    let before = goes_on.then(|| until(history.replid2)).flatten();
    let own_from = if goes_on { history.second_offset } else { 1 };
    let found = match (until(history.replid), before) {
        // Nothing is known of its own part; but it has left the common history before that began.
        (None, Some(from)) if from < own_from => Tail { from, known: true },
        (None, _) => {
            let was_replaced =
                stood.is_some_and(|epoch| departures.iter().any(|d| d.epoch > epoch));
            let may_be_lost = was_replaced.then_some(own_from)?;
            Tail {
                from: may_be_lost,
                known: false,
            }
        }
        (Some(from), _) => Tail { from, known: true },
    };
    (history.offset >= found.from).then_some(found)
}

/// Of a controller that knows of one failover only, that one.
fn departures(spec: &NodeSpec) -> Vec<Departure> {
    if spec.departures.is_empty() && !spec.previous_replid.is_empty() {
        return vec![Departure {
            epoch: 0,
            replid: spec.previous_replid.clone(),
            offset: spec.previous_offset,
        }];
    }
    spec.departures.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZEROS: &str = "0000000000000000000000000000000000000000";

    /// `x` was the first primary's history, `y` went on from it at 100, `z` from that at 200.
    fn twice_replaced() -> NodeSpec {
        spec(&[(5, "x", 100), (7, "y", 200)])
    }

    fn spec(departures: &[(u64, &str, u64)]) -> NodeSpec {
        let departure = |(epoch, replid, offset): &(u64, &str, u64)| Departure {
            epoch: *epoch,
            replid: (*replid).to_owned(),
            offset: *offset,
        };
        NodeSpec {
            epoch: 7,
            departures: departures.iter().map(departure).collect(),
            ..NodeSpec::default()
        }
    }

    fn first<'a>(replid: &'a str, offset: u64) -> History<'a> {
        History {
            replid,
            offset,
            replid2: ZEROS,
            second_offset: 0,
        }
    }

    fn known(from: u64) -> Option<Tail> {
        Some(Tail { from, known: true })
    }

    #[test]
    fn a_primary_finds_its_own_history_over_two_failovers() {
        let spec = twice_replaced();
        assert_eq!(tail(&spec, &first("x", 150), Some(4)), known(100));
        assert_eq!(tail(&spec, &first("y", 200), Some(5)), known(200));
        assert_eq!(tail(&spec, &first("x", 99), Some(4)), None);
    }

    #[test]
    fn one_that_went_on_from_a_history_that_was_left_earlier_has_all_of_it_and_its_own_to_lose() {
        // Promoted at 140 of `x`, and another one at 100 became the primary.
        let never_named = History {
            replid2: "x",
            second_offset: 140,
            ..first("w", 139)
        };
        assert_eq!(tail(&twice_replaced(), &never_named, Some(4)), known(100));
        let with_less = History {
            second_offset: 90,
            offset: 89,
            ..never_named
        };
        assert_eq!(tail(&twice_replaced(), &with_less, Some(4)), None);
    }

    #[test]
    fn a_history_that_no_remembered_failover_tells_of_is_said_not_to_be_known() {
        let unknown = |from| Some(Tail { from, known: false });
        let spec = twice_replaced();
        assert_eq!(tail(&spec, &first("a", 150), Some(3)), unknown(1));
        let went_on = History {
            replid2: "b",
            second_offset: 120,
            ..first("a", 150)
        };
        assert_eq!(tail(&spec, &went_on, Some(3)), unknown(120));
        assert_eq!(
            tail(&self::spec(&[(7, "", 0)]), &first("a", 150), Some(6)),
            unknown(1)
        );
    }

    #[test]
    fn one_that_nobody_replaced_has_nothing_to_lose() {
        let undone = History {
            replid2: "y",
            second_offset: 151,
            ..first("w", 150)
        };
        // Promoted in a hand-over that was undone, or one that never served.
        assert_eq!(tail(&spec(&[]), &undone, Some(7)), None);
        assert_eq!(tail(&spec(&[(5, "x", 100)]), &undone, Some(6)), None);
        assert_eq!(tail(&twice_replaced(), &first("new", 0), None), None);
        assert_eq!(tail(&twice_replaced(), &first("new", 50), None), None);
    }

    #[test]
    fn the_single_departure_of_an_older_controller_is_enough() {
        let spec = NodeSpec {
            previous_replid: "x".into(),
            previous_offset: 100,
            ..NodeSpec::default()
        };
        assert_eq!(tail(&spec, &first("x", 100), Some(4)), known(100));
        assert_eq!(tail(&spec, &first("y", 100), Some(4)), None);
    }
}
