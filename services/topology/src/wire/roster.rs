//! Who has left a shard, as records say it.

use slotmesh_proto::store::v1 as store;

use crate::shard::{GoneNode, Older, Roster};

pub(super) fn from(record: &store::ShardRecord) -> Roster {
    let gone = record.gone_nodes.iter().map(|gone| GoneNode {
        node: gone.node_id.as_str().into(),
        host: gone.host_id.as_str().into(),
    });
    let older = |foreseen| {
        let those = record.older.iter().filter(move |o| o.foreseen == foreseen);
        those.map(older_from).collect()
    };
    Roster {
        gone: gone.collect(),
        made: record.nodes_made,
        membership: record.membership,
        newcomers: record.newcomers.iter().map(|n| n.as_str().into()).collect(),
        older: older(false),
        foreseen: older(true),
    }
}

fn older_from(record: &store::OlderFollower) -> Older {
    Older {
        node: record.node_id.as_str().into(),
        run_id: record.run_id.clone(),
        refused: record.refused,
    }
}

pub(super) fn older_to(roster: &Roster) -> Vec<store::OlderFollower> {
    let to = |older: &Older, foreseen| store::OlderFollower {
        node_id: older.node.to_string(),
        run_id: older.run_id.clone(),
        refused: older.refused,
        foreseen,
    };
    let now = roster.older.iter().map(|o| to(o, false));
    now.chain(roster.foreseen.iter().map(|o| to(o, true)))
        .collect()
}

pub(super) fn newcomers_to(roster: &Roster) -> Vec<String> {
    roster.newcomers.iter().map(ToString::to_string).collect()
}

pub(super) fn gone_to(roster: &Roster) -> Vec<store::GoneNode> {
    let to = |gone: &GoneNode| store::GoneNode {
        node_id: gone.node.to_string(),
        host_id: gone.host.to_string(),
    };
    roster.gone.iter().map(to).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        shard::{PRIORITY, tests::shard},
        wire::{shard_from, shard_to},
    };

    #[test]
    fn who_is_preferred_and_who_has_left_survives_the_round_trip() {
        let mut shard = shard();
        (shard.members[1].priority, shard.members[2].leaving) = (0, true);
        shard.roster = Roster {
            gone: vec![GoneNode {
                node: "d".into(),
                host: "host-d".into(),
            }],
            made: 5,
            membership: 9,
            newcomers: vec!["b".into()],
            older: vec![Older {
                node: "b".into(),
                run_id: "run-b".into(),
                refused: 3,
            }],
            foreseen: vec![Older {
                node: "c".into(),
                run_id: "run-c".into(),
                refused: 0,
            }],
        };
        let record = shard_to(&shard);
        assert_eq!(shard_from(&record).unwrap(), shard);
        let mut older = record;
        older.members[1].priority = None;
        assert_eq!(shard_from(&older).unwrap().members[1].priority, PRIORITY);
    }
}
