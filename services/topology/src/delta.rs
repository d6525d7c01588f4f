//! Snapshots of an instance's routes, and the difference between two of them.

use std::collections::BTreeMap;

use slotmesh_proto::topology::v1 as pb;

/// All that the proxies of one instance are told, at one revision.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct View {
    /// The store's revision that it was derived from.
    pub revision: u64,
    /// Instance-wide settings.
    pub settings: pb::InstanceSettings,
    /// Routes by shard id.
    pub shards: BTreeMap<String, pb::ShardRoute>,
}

impl View {
    /// The whole of it, for a proxy that has nothing.
    #[must_use]
    pub fn snapshot(&self) -> pb::Snapshot {
        pb::Snapshot {
            revision: self.revision,
            settings: Some(self.settings.clone()),
            shards: self.shards.values().cloned().collect(),
        }
    }

    /// What changed since `base`; `None` when nothing that a proxy can see did.
    #[must_use]
    pub fn since(&self, base: &Self) -> Option<pb::Delta> {
        let changed: Vec<_> = self
            .shards
            .iter()
            .filter(|(id, route)| base.shards.get(*id) != Some(route))
            .map(|(_, route)| route.clone())
            .collect();
        let removed_shard_ids: Vec<_> = base
            .shards
            .keys()
            .filter(|id| !self.shards.contains_key(*id))
            .cloned()
            .collect();
        let settings = (self.settings != base.settings).then(|| self.settings.clone());
        if changed.is_empty() && removed_shard_ids.is_empty() && settings.is_none() {
            return None;
        }
        Some(pb::Delta {
            base_revision: base.revision,
            revision: self.revision,
            settings,
            changed,
            removed_shard_ids,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(revision: u64, epochs: &[(&str, u64)]) -> View {
        let route = |id: &str, epoch| pb::ShardRoute {
            shard_id: id.to_owned(),
            epoch,
            ..pb::ShardRoute::default()
        };
        View {
            revision,
            settings: pb::InstanceSettings::default(),
            shards: epochs
                .iter()
                .map(|(id, e)| ((*id).to_owned(), route(id, *e)))
                .collect(),
        }
    }

    #[test]
    fn a_delta_names_what_changed_and_what_went() {
        let (old, new) = (
            view(7, &[("0", 1), ("1", 1)]),
            view(9, &[("1", 2), ("2", 1)]),
        );
        let delta = new.since(&old).unwrap();
        assert_eq!((delta.base_revision, delta.revision), (7, 9));
        let changed: Vec<_> = delta
            .changed
            .iter()
            .map(|r| (&*r.shard_id, r.epoch))
            .collect();
        assert_eq!(changed, [("1", 2), ("2", 1)]);
        assert_eq!(delta.removed_shard_ids, ["0"]);
    }

    #[test]
    fn nothing_visible_makes_no_delta() {
        assert_eq!(view(9, &[("0", 1)]).since(&view(7, &[("0", 1)])), None);
    }
}
