//! Where failovers left the histories, in records and assignments.
//!
//! Invariant: what a release wrote that kept one failover only is read, and what it reads is written.

use slotmesh_proto::store::v1 as store;

use crate::{
    id::Epoch,
    shard::{Departure, Lineage, Shard},
};

/// Writes where the last failovers left the histories.
pub(crate) fn departures_to(shard: &Shard) -> Vec<store::Departure> {
    let to = |departure: &Departure| store::Departure {
        epoch: departure.epoch.0,
        replid: (departure.from.as_ref()).map_or_else(String::new, |l| l.replid.clone()),
        offset: departure.from.as_ref().map_or(0, |l| l.offset),
    };
    shard.departures.iter().map(to).collect()
}

/// Reads them. A record of a release that kept only the newest one says that one.
pub(super) fn departures_from(record: &store::ShardRecord) -> Vec<Departure> {
    let from = |epoch, replid: &str, offset| Departure {
        epoch: Epoch(epoch),
        from: (!replid.is_empty()).then(|| Lineage {
            replid: replid.to_owned(),
            offset,
        }),
    };
    if record.departures.is_empty() && !record.previous_replid.is_empty() {
        return vec![from(0, &record.previous_replid, record.previous_offset)];
    }
    let all = record.departures.iter();
    all.map(|d| from(d.epoch, &d.replid, d.offset)).collect()
}

fn newest(shard: &Shard) -> Option<&Lineage> {
    shard.departures.last()?.from.as_ref()
}

/// For readers that know of one failover only.
pub(crate) fn newest_replid(shard: &Shard) -> String {
    newest(shard).map_or_else(String::new, |l| l.replid.clone())
}

/// See [`newest_replid`].
pub(crate) fn newest_offset(shard: &Shard) -> u64 {
    newest(shard).map_or(0, |l| l.offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        shard::tests::shard,
        wire::{shard_from, shard_to},
    };

    fn departure(epoch: u64, from: Option<(&str, u64)>) -> Departure {
        Departure {
            epoch: Epoch(epoch),
            from: from.map(|(replid, offset)| Lineage {
                replid: replid.to_owned(),
                offset,
            }),
        }
    }

    #[test]
    fn a_record_that_knows_of_one_failover_only_is_read_and_written_for_readers_that_do() {
        let old = store::ShardRecord {
            previous_replid: "x".into(),
            previous_offset: 7,
            ..shard_to(&shard())
        };
        let read = shard_from(&old).unwrap();
        assert_eq!(read.departures, [departure(0, Some(("x", 7)))]);
        let written = shard_to(&read);
        assert_eq!(
            (&*written.previous_replid, written.previous_offset),
            ("x", 7)
        );
    }

    #[test]
    fn departures_survive_the_round_trip() {
        let shard = Shard {
            departures: vec![
                departure(4, Some(("x", 7))),
                departure(5, None),
                departure(6, Some(("y", 9))),
            ],
            ..shard()
        };
        assert_eq!(shard_from(&shard_to(&shard)).unwrap(), shard);
    }
}
