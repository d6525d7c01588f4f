//! Records of replacements, and how the API shows one.

use slotmesh_proto::{store::v1 as store, task::v1 as api};
use slotmesh_topology::Epoch;

use crate::spec::{NodeReplacement, ReplacePhase};

pub(super) fn from(record: &store::ReplaceSpec) -> Option<NodeReplacement> {
    Some(NodeReplacement {
        shard: record.shard_id.as_str().into(),
        from: record.from_node_id.as_str().into(),
        from_host: record.from_host_id.as_str().into(),
        to: record.to_node_id.as_str().into(),
        to_host: record.to_host_id.as_str().into(),
        phase: match record.phase() {
            store::ReplacePhase::Unspecified => return None,
            store::ReplacePhase::Join => ReplacePhase::Join,
            store::ReplacePhase::CatchUp => ReplacePhase::CatchUp,
            store::ReplacePhase::Leave => ReplacePhase::Leave,
            store::ReplacePhase::Drain => ReplacePhase::Drain,
            store::ReplacePhase::Done => ReplacePhase::Done,
            store::ReplacePhase::Parked => ReplacePhase::Parked,
        },
        phase_since_ms: record.phase_since_unix_ms,
        message: record.message.clone(),
        cause: record.cause.clone(),
        by_operator: record.by_operator,
        turned_back: record.turned_back,
        on_request: record.on_request,
        epoch: Epoch(record.epoch),
        drain_offset: record.drain_offset,
    })
}

pub(super) fn to(replacement: &NodeReplacement) -> store::ReplaceSpec {
    let phase = match replacement.phase {
        ReplacePhase::Join => store::ReplacePhase::Join,
        ReplacePhase::CatchUp => store::ReplacePhase::CatchUp,
        ReplacePhase::Leave => store::ReplacePhase::Leave,
        ReplacePhase::Drain => store::ReplacePhase::Drain,
        ReplacePhase::Done => store::ReplacePhase::Done,
        ReplacePhase::Parked => store::ReplacePhase::Parked,
    };
    store::ReplaceSpec {
        shard_id: replacement.shard.to_string(),
        from_node_id: replacement.from.to_string(),
        from_host_id: replacement.from_host.to_string(),
        to_node_id: replacement.to.to_string(),
        to_host_id: replacement.to_host.to_string(),
        phase: phase.into(),
        phase_since_unix_ms: replacement.phase_since_ms,
        message: replacement.message.clone(),
        cause: replacement.cause.clone(),
        by_operator: replacement.by_operator,
        turned_back: replacement.turned_back,
        on_request: replacement.on_request,
        epoch: replacement.epoch.0,
        drain_offset: replacement.drain_offset,
    }
}

pub(super) fn progress(replacement: &NodeReplacement) -> api::ShardProgress {
    api::ShardProgress {
        shard_id: replacement.shard.to_string(),
        from_node_id: replacement.from.to_string(),
        to_node_id: replacement.to.to_string(),
        phase: replacement.phase.name().to_owned(),
        message: replacement.message.clone(),
        ..api::ShardProgress::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replacement_survives_the_round_trip_in_each_phase() {
        for phase in [
            ReplacePhase::Join,
            ReplacePhase::CatchUp,
            ReplacePhase::Leave,
            ReplacePhase::Drain,
            ReplacePhase::Done,
            ReplacePhase::Parked,
        ] {
            let replacement = NodeReplacement {
                shard: "0".into(),
                from: "b".into(),
                from_host: "host-b".into(),
                to: "r-0-2".into(),
                to_host: "host-c".into(),
                phase,
                phase_since_ms: 7,
                message: "why".into(),
                cause: "seen".into(),
                by_operator: true,
                turned_back: true,
                on_request: true,
                epoch: Epoch(4),
                drain_offset: 9,
            };
            assert_eq!(from(&to(&replacement)), Some(replacement));
        }
        assert_eq!(from(&store::ReplaceSpec::default()), None);
    }
}
