//! An upgrade as its record keeps it: what is asked for, and how far each shard has come.
//!
//! Invariant: a rollback state that is closed stays closed, and is never open when one can't go back.

use slotmesh_topology::{Epoch, NodeId, ShardId};

use crate::{observe::CommandCost, spec::ShardSwitch};

/// Another engine for an instance's nodes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Upgrade {
    /// Artifact that the nodes run in the end.
    pub engine: String,
    /// The instance's before; empty: the agents' default.
    pub from_engine: String,
    /// For how long the old primary is kept as it is after the switch.
    pub bake_ms: u64,
    /// Shards that come first, and are waited for.
    pub canary_shards: u32,
    /// Shards under way at a time after those; at least 1.
    pub parallel_shards: u32,
    /// The bake ends on an operator's word only.
    pub finalize_by_operator: bool,
    /// The old primary becomes the primary again in the end.
    pub preserve_roles: bool,
    /// Shards begin, and are switched, in the maintenance window only.
    pub in_window: bool,
    /// No further shard begins.
    pub paused: bool,
    /// Why, when it was not an operator who paused it; empty: it was.
    pub paused_why: String,
    /// A switch that holds commands for longer pauses it; 0: none does.
    pub max_hold_ms: u32,
    /// Nobody asked for it but the instance's setting.
    pub automatic: bool,
    /// Agreed to: writes may wait for a node that restarts.
    pub allow_downtime: bool,
    /// How nodes get the engine, as it was asked for.
    pub method: Method,
    /// In their order.
    pub shards: Vec<ShardUpgrade>,
}

/// How nodes get another engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Method {
    /// In place, and through a new node where a shard has but one.
    #[default]
    Auto,
    /// Where they are, one after the other.
    InPlace,
    /// Each node's place is taken by a new one on another host.
    CrossHost,
}

/// One shard's part.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardUpgrade {
    /// Which shard.
    pub shard: ShardId,
    /// How far it has come. Written before the act that the phase stands for.
    pub phase: UpgradePhase,
    /// Since when.
    pub phase_since_ms: u64,
    /// What it waits for, or how it ended.
    pub message: String,
    /// New nodes with the engine take the places of its nodes; otherwise those get it where they are.
    pub moved: bool,
    /// Of a moved one, with durability: up to where those that stay must come before the one that leaves
    /// is left out.
    pub drain: Option<Drain>,
    /// Its nodes, as they were at admission, and those that joined since. Of a moved one: as they were
    /// when it began.
    pub nodes: Vec<NodeUpgrade>,
    /// The switch under way, or the last one.
    pub switch: Option<ShardSwitch>,
    /// From the switch on.
    pub rollback: Option<Rollback>,
    /// Why it goes back to what was before.
    pub why_back: Option<String>,
    /// It was an operator who turned it back.
    pub on_request: bool,
    /// Longest hold of its switches, in microseconds.
    pub hold_us: u64,
    /// Holds of its switches before the last one, together, in microseconds.
    pub held_us: u64,
    /// Switches that were given up in this phase.
    pub tries: u32,
    /// An operator ends the bake.
    pub finalize: bool,
    /// Of a parked one: where it goes on.
    pub parked_in: Option<UpgradePhase>,
    /// An operator has said, in this phase, to try again: whoever is away is not waited for.
    pub retried: bool,
    /// Why it goes back, or went, says nothing about the engine: a host was lost, or there was none.
    pub blameless: bool,
    /// Of the shard, when it began; 0: it has not, or under a release that did not note it.
    pub began_epoch: Epoch,
}

/// What those that stay must have of a primary's stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Drain {
    /// Whose stream.
    pub epoch: Epoch,
    /// Up to here.
    pub offset: u64,
}

/// A node's part.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeUpgrade {
    /// Which node.
    pub node: NodeId,
    /// As its member had it; empty: the instance's.
    pub from_engine: String,
    /// That it reported at admission; empty: it had not.
    pub from_version: String,
    /// Its host has the engine, and has tried it. Not of a moved shard.
    pub staged: bool,
}

/// Whether a shard can go back to its old primary without loss.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Rollback {
    /// It can, as far as is recorded.
    pub open: bool,
    /// Why it can't.
    pub why: String,
    /// The old primary.
    pub old: NodeId,
    /// Its process, which must be the same one all the time.
    pub old_run_id: String,
    /// Replicated commands that it had refused before.
    pub old_unexpected_errors: u64,
    /// The new primary.
    pub new: NodeId,
    /// Its process.
    pub new_run_id: String,
    /// Full copies that it had served before.
    pub new_sync_full: u64,
    /// What the old primary has is not what the new one has: it copies anew.
    pub diverged: bool,
    /// Of an open one: why it is not known to be open at this moment; empty: it is.
    pub doubt: String,
    /// Changes of that doubt that were written down.
    pub doubts: u32,
    /// Since when the old primary has not been in sync; 0: it is.
    pub behind_since_ms: u64,
    /// What proxies said in the seconds before the switch: how many requests of the shard were answered
    /// by errors that are no client's fault; `None`: it was not counted.
    pub faults_before: Option<u64>,
    /// What commands cost the old primary in the seconds before the switch; empty: it was not counted.
    pub costs_before: Vec<CommandCost>,
}

/// Phases of one shard's upgrade.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum UpgradePhase {
    /// Hosts fetch the engine and try it on the node's own data; no effect.
    Stage,
    /// Waits for its turn, or its time; no lock yet.
    Ready,
    /// One replica after the other.
    Replicas,
    /// An upgraded replica becomes the primary.
    Switch,
    /// The old primary follows with the old engine: the way back.
    Bake,
    /// The old primary is upgraded.
    Finalize,
    /// It becomes the primary again.
    Preserve,
    /// The old primary becomes the primary again, with the old engine.
    SwitchBack,
    /// The others get the old engine back.
    UndoNodes,
    /// Every node runs the engine.
    Done,
    /// Every node runs what it ran before.
    RolledBack,
    /// Can't go on without an operator's word. The shard serves.
    Parked,
}

impl UpgradePhase {
    /// Every phase, in order.
    pub const ALL: [Self; 12] = [
        Self::Stage,
        Self::Ready,
        Self::Replicas,
        Self::Switch,
        Self::Bake,
        Self::Finalize,
        Self::Preserve,
        Self::SwitchBack,
        Self::UndoNodes,
        Self::Parked,
        Self::Done,
        Self::RolledBack,
    ];
    /// Phases before the end, for progress displays.
    pub const STEPS: u32 = 6;

    /// Name as users see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Stage => "Stage",
            Self::Ready => "Ready",
            Self::Replicas => "Replicas",
            Self::Switch => "Switch",
            Self::Bake => "Bake",
            Self::Finalize => "Finalize",
            Self::Preserve => "Preserve",
            Self::SwitchBack => "SwitchBack",
            Self::UndoNodes => "UndoNodes",
            Self::Done => "Done",
            Self::RolledBack => "RolledBack",
            Self::Parked => "Parked",
        }
    }

    /// How many of them are behind it.
    #[must_use]
    pub fn steps_done(self) -> u32 {
        match self {
            Self::Stage => 0,
            Self::Ready => 1,
            Self::Replicas | Self::UndoNodes | Self::Parked => 2,
            Self::Switch | Self::SwitchBack => 3,
            Self::Bake => 4,
            Self::Finalize | Self::Preserve => 5,
            Self::Done | Self::RolledBack => 6,
        }
    }

    /// Nothing follows it.
    #[must_use]
    pub fn is_ended(self) -> bool {
        matches!(self, Self::Done | Self::RolledBack)
    }

    /// It has changed nothing, and has no lock.
    #[must_use]
    pub fn is_before(self) -> bool {
        matches!(self, Self::Stage | Self::Ready)
    }
}

impl Upgrade {
    /// One shard's part.
    #[must_use]
    pub fn part(&self, shard: &str) -> Option<&ShardUpgrade> {
        self.shards.iter().find(|s| s.shard.as_str() == shard)
    }

    /// As [`Upgrade::part`], to change it.
    pub fn part_mut(&mut self, shard: &ShardId) -> Option<&mut ShardUpgrade> {
        self.shards.iter_mut().find(|s| s.shard == *shard)
    }

    pub(crate) fn switch_mut(&mut self, shard: &ShardId) -> Option<&mut ShardSwitch> {
        self.part_mut(shard)?.switch.as_mut()
    }

    /// A shard has had its turn.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        self.shards.iter().any(|s| !s.phase.is_before())
    }

    /// A shard waits for an operator.
    #[must_use]
    pub fn is_parked(&self) -> bool {
        self.shards.iter().any(|s| s.phase == UpgradePhase::Parked)
    }

    /// Steps behind it and in all.
    #[must_use]
    pub fn progress(&self) -> (u32, u32) {
        let done = self.shards.iter().map(|s| s.phase.steps_done()).sum();
        let all = self.shards.iter().map(|_| UpgradePhase::STEPS).sum();
        (done, all)
    }
}

impl Rollback {
    /// Its state as users see it, and why it is not open.
    #[must_use]
    pub fn shown(&self) -> (&'static str, &str) {
        match (self.open, self.doubt.as_str()) {
            (true, "") => ("Open", ""),
            (true, doubt) => ("Unknown", doubt),
            (false, _) => ("Closed", &self.why),
        }
    }
}

impl ShardUpgrade {
    /// The node's part.
    #[must_use]
    pub fn node(&self, node: &NodeId) -> Option<&NodeUpgrade> {
        self.nodes.iter().find(|n| n.node == *node)
    }

    /// Holds of all its switches together, in microseconds.
    #[must_use]
    pub fn total_hold_us(&self) -> u64 {
        self.held_us + self.switch.as_ref().map_or(0, |s| s.hold_us)
    }

    /// The engine that the node had; empty: the instance's.
    #[must_use]
    pub fn from_engine(&self, node: &NodeId) -> &str {
        self.node(node).map_or("", |n| &n.from_engine)
    }
}
