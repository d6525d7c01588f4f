//! Whether an instance's engines can say what is on their disks.
//!
//! Invariant: only an engine that is known not to is a reason to refuse; one that has not said its
//! version yet is found out by the proxies, which then promise nothing.

use std::collections::HashMap;

use slotmesh_task::admit::RefusalKind;
use slotmesh_topology::{
    Instance,
    artifact::{Product, Version, parse_reported},
};
use tonic::Status;

use super::Instances;
use crate::grpc::refuse;

/// Asks for writes to be on disks before they are acknowledged.
const PARAMETER: &str = "durability_fsync";
/// The first Redis that has WAITAOF. Every Valkey has it.
const SINCE: Version = Version {
    major: 7,
    minor: 2,
    patch: 0,
};

impl Instances {
    /// Refuses what the proxies would have to refuse for every write.
    #[allow(clippy::result_large_err)]
    pub(super) fn disks_can_be_asked(
        &self,
        instance: &Instance,
        wanted: &HashMap<String, String>,
    ) -> Result<(), Status> {
        if wanted.get(PARAMETER).is_none_or(|value| value != "yes") {
            return Ok(());
        }
        let shards = self.context.mirror.read(|s| s.shards_of(&instance.id));
        let versions = self.context.hub.read(|fleet| {
            let members = shards.iter().flat_map(|s| &s.value.members);
            let version = |m: &slotmesh_topology::Member| {
                let seen = fleet.node(&m.node)?;
                Some((m.node.to_string(), seen.version.clone()))
            };
            members.filter_map(version).collect::<Vec<_>>()
        });
        refusal(&versions).map_or(Ok(()), Err)
    }
}

/// Of nodes with what they say that they run.
fn refusal(versions: &[(String, String)]) -> Option<Status> {
    let can_not = |(_, version): &&(String, String)| {
        parse_reported(version)
            .is_some_and(|(product, version)| product == Product::Redis && version < SINCE)
    };
    let (node, version) = versions.iter().find(can_not)?;
    Some(refuse(
        RefusalKind::Precondition,
        "ENGINE_WITHOUT_WAITAOF",
        format!(
            "{PARAMETER} needs an engine with WAITAOF, that is Redis 7.2 or later or Valkey; node \
             {node} runs {version}: move the instance to such an engine first"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(versions: &[&str]) -> bool {
        let nodes = versions.iter().enumerate();
        let nodes = nodes.map(|(n, version)| (format!("n-{n}"), (*version).to_owned()));
        refusal(&nodes.collect::<Vec<_>>()).is_some()
    }

    #[test]
    fn one_old_engine_is_enough_to_refuse_and_an_unknown_one_is_not() {
        assert!(refused(&["7.2.4", "7.0.15"]));
        assert!(refused(&["6.2.14"]));
        assert!(!refused(&[
            "7.2.0",
            "8.2.3",
            "valkey-8.0.2",
            "valkey-7.2.5"
        ]));
        assert!(!refused(&["", "unknown"]));
    }
}
