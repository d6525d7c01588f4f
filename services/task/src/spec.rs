//! A task: an operator's durable intent and how far it has come.

use slotmesh_topology::{Epoch, FenceProof, HostId, InstanceId, NodeId, ShardId, TaskId};

use crate::{proxies::Changes, table, upgrade::Upgrade};

/// Where a task is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// Admitted; nothing begun.
    Pending,
    /// Under way.
    Running,
    /// Ended as asked.
    Done,
    /// Ended without effect.
    RolledBack,
    /// Ended without effect, on request.
    Cancelled,
    /// Can't go on by itself; the shards are in a safe mode.
    NeedsOperator,
}

impl State {
    /// No further step follows.
    #[must_use]
    pub fn is_ended(self) -> bool {
        !matches!(self, Self::Pending | Self::Running)
    }
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Spec {
    /// Start an instance's processes until it serves.
    Provision,
    /// Remove an instance's processes and data.
    Decommission,
    /// Make other nodes the primaries of some shards.
    Switchover(Vec<ShardSwitch>),
    /// Give a shard another primary after its own was lost.
    Failover(ShardFailover),
    /// Replace a node of a shard by one on another host.
    Replace(NodeReplacement),
    /// Give an instance's nodes another engine.
    Upgrade(Upgrade),
    /// Give proxies of an instance another process.
    Proxies(Changes),
}

impl Spec {
    /// The kind as users see it.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Provision => "Provision",
            Self::Decommission => "Decommission",
            Self::Switchover(_) => "SwitchOver",
            Self::Failover(_) => "Failover",
            Self::Replace(_) => "Replace",
            Self::Upgrade(_) => "UpgradeEngine",
            Self::Proxies(changes) if changes.restart => "RestartProxy",
            Self::Proxies(_) => "UpgradeProxy",
        }
    }
}

impl Spec {
    /// Whether it changes this shard; what concerns an instance as a whole touches all of them.
    #[must_use]
    pub fn touches(&self, shard: &str) -> bool {
        match self {
            Self::Provision | Self::Decommission => true,
            Self::Switchover(switches) => switches.iter().any(|s| s.shard.as_str() == shard),
            Self::Failover(failover) => failover.shard.as_str() == shard,
            Self::Replace(replacement) => replacement.shard.as_str() == shard,
            Self::Upgrade(upgrade) => upgrade.part(shard).is_some(),
            Self::Proxies(_) => false,
        }
    }
}

/// One shard's part of a switchover.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardSwitch {
    /// Which shard.
    pub shard: ShardId,
    /// Its primary when the task was admitted.
    pub from: NodeId,
    /// Its next primary.
    pub to: NodeId,
    /// Its epoch when the task was admitted.
    pub from_epoch: Epoch,
    /// How far it has come. Written before the act that the phase stands for.
    pub phase: Phase,
    /// Since when.
    pub phase_since_ms: u64,
    /// Why it was given up, or what it waits for.
    pub message: String,
    /// Longest hold of a request that a proxy reported, in microseconds.
    pub hold_us: u64,
    /// From the fence to the role change, in microseconds.
    pub critical_us: u64,
}

/// Phases of one shard's switchover, in order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    /// Looking; no effect yet.
    Preflight,
    /// Making the replication users of the next epoch on the target.
    Prewarm,
    /// The record says Handover: proxies hold, then the old primary's agent switches. Whether it
    /// has begun is not recorded; whoever recovers must assume that it may have.
    Hold,
    /// The switch failed half way or nobody knows: observe, then finish or give back.
    Resolve,
    /// Committed: grants, repointing and proxies converge.
    Settle,
    /// Ended: the target is primary.
    Done,
    /// Ended: the old primary serves on.
    RolledBack,
}

impl Phase {
    /// Name as users see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Preflight => "Preflight",
            Self::Prewarm => "Prewarm",
            Self::Hold => "Hold",
            Self::Resolve => "Resolve",
            Self::Settle => "Settle",
            Self::Done => "Done",
            Self::RolledBack => "RolledBack",
        }
    }

    /// Phases before the end, for progress displays.
    pub const STEPS: u32 = 4;

    /// How many of them are behind it.
    #[must_use]
    pub fn steps_done(self) -> u32 {
        match self {
            Self::Preflight => 0,
            Self::Prewarm => 1,
            Self::Hold | Self::Resolve => 2,
            Self::Settle => 3,
            Self::Done | Self::RolledBack => 4,
        }
    }

    /// Nothing follows it.
    #[must_use]
    pub fn is_ended(self) -> bool {
        matches!(self, Self::Done | Self::RolledBack)
    }
}

/// The lost primary of one shard, and who takes its place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardFailover {
    /// Which shard.
    pub shard: ShardId,
    /// The lost primary.
    pub from: NodeId,
    /// Its process that was lost.
    pub from_run_id: String,
    /// The epoch that it had; the failover's is the next.
    pub from_epoch: Epoch,
    /// Who is promoted, once chosen.
    pub to: Option<NodeId>,
    /// How far it has come. Written before the act that the phase stands for.
    pub phase: FailoverPhase,
    /// Since when.
    pub phase_since_ms: u64,
    /// What it waits for, or why it is parked.
    pub message: String,
    /// What was seen, by whom.
    pub cause: String,
    /// Why the lost primary takes no more writes, once known.
    pub proof: Option<FenceProof>,
    /// Longest hold of a request that a proxy reported, in microseconds.
    pub hold_us: u64,
}

/// Phases of a failover, in order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum FailoverPhase {
    /// The record says FailingOver; the lost primary's credentials are being taken, or its lease
    /// runs out.
    Fence,
    /// The lost primary is fenced; replicas are detached, so that their offsets are final.
    Choose,
    /// The record names the target; its agent promotes it.
    Promote,
    /// Committed: grants, repointing and proxies converge.
    Settle,
    /// Ended: the target is primary.
    Done,
    /// Nobody can be promoted without an operator's word. The shard stays without a primary.
    Parked,
}

impl FailoverPhase {
    /// Name as users see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fence => "Fence",
            Self::Choose => "Choose",
            Self::Promote => "Promote",
            Self::Settle => "Settle",
            Self::Done => "Done",
            Self::Parked => "Parked",
        }
    }

    /// Phases before the end, for progress displays.
    pub const STEPS: u32 = 4;

    /// How many of them are behind it.
    #[must_use]
    pub fn steps_done(self) -> u32 {
        match self {
            Self::Fence => 0,
            Self::Choose | Self::Parked => 1,
            Self::Promote => 2,
            Self::Settle => 3,
            Self::Done => 4,
        }
    }
}

/// A node of a shard that is replaced by one on another host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeReplacement {
    /// Which shard.
    pub shard: ShardId,
    /// Who leaves.
    pub from: NodeId,
    /// From where.
    pub from_host: HostId,
    /// Who joins.
    pub to: NodeId,
    /// Where.
    pub to_host: HostId,
    /// How far it has come. Written before the act that the phase stands for.
    pub phase: ReplacePhase,
    /// Since when.
    pub phase_since_ms: u64,
    /// What it waits for, or why it is parked.
    pub message: String,
    /// What was seen, or who asked.
    pub cause: String,
    /// An operator asked for it, so it is done also while the node's host is well.
    pub by_operator: bool,
    /// It was given up: the new node leaves again, the old one stays.
    pub turned_back: bool,
    /// It was an operator who turned it back.
    pub on_request: bool,
    /// Of `drain_offset`.
    pub epoch: Epoch,
    /// The primary's offset after the leaving node had lost its right to follow: what was confirmed
    /// with that node's help is not beyond it.
    pub drain_offset: u64,
}

impl NodeReplacement {
    /// Who leaves in the end, as things stand.
    #[must_use]
    pub fn leaver(&self) -> &NodeId {
        match self.turned_back {
            true => &self.to,
            false => &self.from,
        }
    }
}

/// Phases of a replacement, in order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ReplacePhase {
    /// Looking; no effect yet.
    Join,
    /// The record has the new node: its agent starts it, it copies the primary's data.
    CatchUp,
    /// The record says who leaves: its right to follow is being taken.
    Leave,
    /// What only the leaving node may have confirmed reaches enough of the others.
    Drain,
    /// Ended.
    Done,
    /// Can't go on without an operator's word. The shard serves.
    Parked,
}

impl ReplacePhase {
    /// Name as users see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Join => "Join",
            Self::CatchUp => "CatchUp",
            Self::Leave => "Leave",
            Self::Drain => "Drain",
            Self::Done => "Done",
            Self::Parked => "Parked",
        }
    }

    /// Phases before the end, for progress displays.
    pub const STEPS: u32 = 4;

    /// How many of them are behind it.
    #[must_use]
    pub fn steps_done(self) -> u32 {
        match self {
            Self::Join => 0,
            Self::CatchUp | Self::Parked => 1,
            Self::Leave => 2,
            Self::Drain => 3,
            Self::Done => 4,
        }
    }
}

/// What an operator may tell a task that can't go on by itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Choice {
    /// Try again from where it is.
    Retry,
    /// Put back what was before, where that is possible.
    Undo,
    /// Go on although data may be lost.
    AcceptLoss,
    /// Begin no further shard.
    Pause,
    /// Begin shards again.
    Resume,
    /// Give up the way back now.
    Finalize,
}

impl Choice {
    /// Name as users see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Retry => "Retry",
            Self::Undo => "Undo",
            Self::AcceptLoss => "AcceptLoss",
            Self::Pause => "Pause",
            Self::Resume => "Resume",
            Self::Finalize => "Finalize",
        }
    }
}

/// An operator's intent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Task {
    /// Given by the controller; sortable by time.
    pub id: TaskId,
    /// Whose shards it changes.
    pub instance: InstanceId,
    /// What is to be done, and how far each shard has come.
    pub spec: Spec,
    /// Where it is.
    pub state: State,
    /// Why it ended so, or what it waits for.
    pub message: String,
    /// When it was admitted.
    pub created_ms: u64,
    /// When it was written last.
    pub updated_ms: u64,
    /// After it, a task that can't go on ends instead of waiting.
    pub deadline_ms: u64,
    /// Events recorded so far.
    pub event_count: u64,
    /// Somebody asked to end it without effect.
    pub cancel_requested: bool,
    /// Nothing is begun before this time; 0: at once.
    pub not_before_ms: u64,
    /// It begins in its instance's maintenance window only.
    pub in_window: bool,
    /// An operator's choice that was not acted upon yet.
    pub choice: Option<Choice>,
    /// Of the request that made it, for audit; the leader makes one for a task of its own.
    pub trace_id: String,
    /// How much data it has moved, when it was looked at last.
    pub copied: Copied,
}

/// Data that a task moves, for progress displays.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Copied {
    /// Bytes that replicas have loaded of what they load in full.
    pub done: u64,
    /// Of so many.
    pub total: u64,
    /// Bytes that the next primaries have not applied yet.
    pub lag: u64,
}

impl Task {
    /// Steps behind it and in all, for progress displays.
    #[must_use]
    pub fn progress(&self) -> (u32, u32) {
        match &self.spec {
            Spec::Provision | Spec::Decommission => (u32::from(self.state == State::Done), 1),
            Spec::Switchover(shards) => (
                shards.iter().map(|s| s.phase.steps_done()).sum(),
                shards.iter().map(|_| Phase::STEPS).sum(),
            ),
            Spec::Failover(failover) => (failover.phase.steps_done(), FailoverPhase::STEPS),
            Spec::Replace(replacement) => (replacement.phase.steps_done(), ReplacePhase::STEPS),
            Spec::Upgrade(upgrade) => upgrade.progress(),
            Spec::Proxies(changes) => changes.progress(),
        }
    }

    /// Waits for an operator, and keeps its shard meanwhile. It is looked at again.
    #[must_use]
    pub fn is_parked(&self) -> bool {
        self.state == State::NeedsOperator
            && match &self.spec {
                Spec::Failover(failover) => failover.phase == FailoverPhase::Parked,
                Spec::Replace(replacement) => replacement.phase == ReplacePhase::Parked,
                Spec::Provision | Spec::Decommission => true,
                Spec::Upgrade(upgrade) => upgrade.is_parked(),
                Spec::Proxies(changes) => changes.is_parked(),
                Spec::Switchover(_) => false,
            }
    }

    /// Changes one shard's part; a task without it stays as it is.
    pub fn edit_switch(&mut self, shard: &ShardId, change: impl FnOnce(&mut ShardSwitch)) {
        let found = match &mut self.spec {
            Spec::Switchover(switches) => switches.iter_mut().find(|s| s.shard == *shard),
            Spec::Upgrade(upgrade) => upgrade.switch_mut(shard),
            _ => None,
        };
        if let Some(found) = found {
            change(found);
        }
    }

    /// The task with one shard in `phase` since now. A phase entered again is another try: its
    /// steps are asked for anew.
    #[must_use]
    pub fn with_phase(&self, shard: &ShardId, phase: Phase, message: &str, now_ms: u64) -> Self {
        let mut next = self.clone();
        next.edit_switch(shard, |s| {
            s.phase_since_ms = now_ms.max(s.phase_since_ms + 1);
            s.phase = phase;
            message.clone_into(&mut s.message);
        });
        next
    }

    /// Whether a cancel would still be honoured: the table of steps says so.
    #[must_use]
    pub fn is_cancellable(&self) -> bool {
        table::cancel(self) == table::Cancel::Honoured
    }
}
