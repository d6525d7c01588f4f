//! The three ways in which a primary is lost here, and their ends.
//!
//! Invariant: whatever has to be looked up is looked up before, so that between the two times of a
//! [`Hit`] nothing is done but the fault itself.

use std::time::SystemTime;

use anyhow::Context as _;
use slotmesh_harness::signals;
use slotmesh_proto::{instance::v1::Shard, store::v1::NodeRole};

use super::How;
use crate::chaos::{history::now_us, mesh::Mesh};

/// A fault that is ready to happen.
#[derive(Debug)]
pub(super) struct Fault {
    how: How,
    host: String,
    /// Whom the signal is sent to.
    pids: Vec<u32>,
}

/// When it happened: time is counted from `from_us`, and after `done_us` nobody can have been served
/// by the lost primary.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hit {
    /// Monotonic, before.
    pub(super) from_us: u64,
    /// Monotonic, after.
    pub(super) done_us: u64,
    /// The same as `from_us`, on the clock that events have.
    pub(super) wall: SystemTime,
}

impl Fault {
    /// Looks up who is hit.
    pub(super) fn prepare(
        mesh: &Mesh,
        how: How,
        shard: &Shard,
        host: &str,
    ) -> anyhow::Result<Self> {
        let pids = match how {
            How::Kill => {
                let mut nodes = shard.nodes.iter();
                let primary = nodes.find(|n| n.current_role() == NodeRole::Primary);
                let pid = primary.context("the shard has no primary")?.pid;
                anyhow::ensure!(pid > 0, "the primary has no process");
                vec![pid]
            }
            How::Freeze => mesh.net().pids(&mesh.net().place(host)?.namespace)?,
            How::Cut => vec![],
        };
        Ok(Self {
            how,
            host: host.to_owned(),
            pids,
        })
    }

    /// Now.
    pub(super) fn happen(&self, mesh: &Mesh) -> anyhow::Result<Hit> {
        let (from_us, wall) = (now_us(), SystemTime::now());
        match self.how {
            How::Kill => self.pids.iter().try_for_each(|pid| signals::kill(*pid))?,
            How::Freeze => {
                for pid in &self.pids {
                    // It may have ended since it was looked up.
                    let _ = signals::freeze(*pid);
                }
            }
            How::Cut => mesh.net().cut(&self.host)?,
        }
        Ok(Hit {
            from_us,
            done_us: now_us(),
            wall,
        })
    }

    /// Undoes what can be undone; what was killed is started again by its agent.
    pub(super) fn end(&self, mesh: &Mesh) -> anyhow::Result<()> {
        match self.how {
            How::Kill => Ok(()),
            How::Freeze => {
                for pid in &self.pids {
                    // It may have been killed meanwhile, as a fence.
                    let _ = signals::thaw(*pid);
                }
                Ok(())
            }
            How::Cut => mesh.net().heal(&self.host),
        }
    }
}
