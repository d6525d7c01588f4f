//! Gives instances patches by themselves, as they are set to have them.
//!
//! Invariant: what is admitted here is what an operator could have admitted: the same plan and the same
//! checks, in one transaction that compares the instance as it was judged.

use std::{cmp::Reverse, collections::BTreeMap, time::Duration};

use slotmesh_task::{
    auto::{self, Scene, Verdict},
    steady, upgrade,
};
use slotmesh_topology::{
    Instance, InstanceId, Shard,
    artifact::Artifact,
    compatibility::{self, Engine},
};
use tokio::time::Instant;
use tracing::{info, warn};

use super::{
    DriveError, Driver, Next,
    failover::new_task_id,
    write::{put_instance, put_task},
};
use crate::{
    clock,
    grpc::artifact::listed,
    mirror::Versioned,
    store::keys::{self, Key},
};

/// Between two looks: a window is an hour at least, and a look reads the catalogue.
const LOOK: Duration = Duration::from_secs(30);

/// What the rounds remember; gone with the term, which only makes the next one look at once.
#[derive(Debug)]
pub(super) struct Rounds {
    /// Instances at a time; 0: none.
    pub(super) at_a_time: usize,
    looked: Option<Instant>,
    /// Why each instance was not given what was due, so that it is said once.
    said: BTreeMap<InstanceId, String>,
}

impl Default for Rounds {
    fn default() -> Self {
        Self {
            at_a_time: auto::AT_A_TIME,
            looked: None,
            said: BTreeMap::new(),
        }
    }
}

impl Driver {
    /// Notes a jump of the wall clock: windows do not count for a while then, and what was seen gone before
    /// it has been gone for no longer than before.
    pub(super) fn look_at_the_clock(&mut self) {
        let rests_ms = self.jumps.look();
        let jumped_ms = self.jumps.jumped_ms();
        self.sightings
            .shift(jumped_ms.saturating_sub(self.jumped_ms));
        self.jumped_ms = jumped_ms;
        if rests_ms > 0 && self.rests_ms == 0 {
            warn!(
                rests_ms,
                "the clock has jumped: maintenance windows do not count until it is steady"
            );
        }
        self.rests_ms = rests_ms;
    }

    /// A leader whose clock is behind what another one has written: nobody can say whose is right.
    pub(super) fn compare_clock_with_records(&self) {
        let written_ms = self
            .mirror
            .read(|s| s.tasks.values().map(|t| t.value.updated_ms).max());
        let ahead_ms = written_ms.unwrap_or(0).saturating_sub(clock::now_ms());
        if ahead_ms > steady::JUMP_MS {
            warn!(
                ahead_ms,
                "records are of a time to come: is this host's clock right?"
            );
            self.jumps.distrust();
        }
    }

    /// At most one instance is given a patch in a round: the most urgent one.
    pub(super) async fn upgrade_by_themselves(&mut self) -> Result<(), DriveError> {
        let is_early = |at: Instant| at.elapsed() < LOOK;
        if self.by_themselves.looked.is_some_and(is_early) {
            return Ok(());
        }
        self.by_themselves.looked = Some(Instant::now());
        let is_wanted = |i: &Versioned<Instance>| i.value.auto_upgrade.is_some();
        let wanted = self.mirror.read(|s| s.instances.values().any(is_wanted));
        if !wanted {
            return Ok(());
        }
        let listed = listed(&*self.store).await?;
        if self.due(&listed, clock::now_ms()).is_empty() || !self.knows_what_has_begun().await? {
            return Ok(());
        }
        for (instance, to) in self.due(&listed, clock::now_ms()) {
            // One that can't be upgraded keeps no other one from it.
            if self.begin_by_itself(&instance, to).await? {
                break;
            }
        }
        Ok(())
    }

    /// The mirror shows each upgrade that has begun up to now, by this leader or one before it: how many are
    /// under way is counted there. Each comes with its instance's record, and after this look only this
    /// leader can begin another one.
    async fn knows_what_has_begun(&self) -> Result<bool, DriveError> {
        let instances = self.store.list(keys::INSTANCES).await?.items;
        let newest = instances.iter().map(|i| i.mod_revision).max();
        Ok(self.mirror.shows(newest.unwrap_or(0)).await)
    }

    /// Whose turn it is, the most urgent first.
    fn due(&self, listed: &[Artifact], now_ms: u64) -> Vec<(Versioned<Instance>, Engine)> {
        self.mirror.read(|state| {
            let tasks: Vec<_> = state.tasks.values().map(|t| &t.value).collect();
            let instances: Vec<_> = state.instances.values().map(|i| &i.value).collect();
            let scene = Scene {
                listed,
                instances: &instances,
                tasks: &tasks,
                at_a_time: self.by_themselves.at_a_time,
                now_ms,
                rests_ms: self.rests_ms,
            };
            let judge = |instance: &Versioned<Instance>| {
                let shards = state.shards_of(&instance.value.id);
                let shards: Vec<Shard> = shards.into_iter().map(|s| s.value).collect();
                let engines = self.hub.read(|fleet| auto::engines(&shards, fleet));
                match auto::judge(&instance.value, engines.as_deref(), scene) {
                    Verdict::Due { to, level } => Some((level, instance.clone(), to)),
                    Verdict::Off | Verdict::Wait { .. } => None,
                }
            };
            let mut due: Vec<_> = state.instances.values().filter_map(judge).collect();
            due.sort_by_key(|(level, ..)| Reverse(*level));
            due.into_iter().map(|(_, i, to)| (i, to)).collect()
        })
    }

    /// Whether it has begun.
    async fn begin_by_itself(
        &mut self,
        instance: &Versioned<Instance>,
        to: Engine,
    ) -> Result<bool, DriveError> {
        let (id, now_ms) = (&instance.value.id, clock::now_ms());
        let shards = self.mirror.read(|s| s.shards_of(id));
        let mut shards: Vec<Shard> = shards.into_iter().map(|s| s.value).collect();
        shards.sort_by_key(|s| s.index);
        let options = auto::options(to);
        let planned = self
            .hub
            .read(|fleet| upgrade::plan(&instance.value, &shards, fleet, &options, now_ms));
        let planned = match planned {
            Ok(planned) if !planned.nothing_to_do => planned.upgrade,
            Ok(_) => return Ok(false),
            Err(refusal) => {
                let said = self
                    .by_themselves
                    .said
                    .insert(id.clone(), refusal.message.clone());
                if said.as_ref() != Some(&refusal.message) {
                    let to = compatibility::name(to);
                    warn!(instance = %id, to, why = refusal.message, "not upgraded by itself");
                }
                return Ok(false);
            }
        };
        self.by_themselves.said.remove(id);
        let task = auto::task(new_task_id(), &instance.value, planned, now_ms);
        info!(task = %task.id, instance = %id, to = compatibility::name(to), "upgraded by itself");
        // Written as it is: of two upgrades admitted at the same time one has to look again.
        let txn = put_instance(self.term.txn(), instance.mod_revision, &instance.value).absent(
            Key::Task {
                task: task.id.as_str(),
            },
        );
        let words = task.message.clone();
        let done = self.commit(put_task(txn, task, "", "Admitted", &words));
        Ok(done.await? == Next::Again)
    }
}

#[cfg(test)]
#[path = "upgrade_auto_tests.rs"]
mod tests;
