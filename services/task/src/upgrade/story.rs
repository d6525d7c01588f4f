//! For tests: an upgrade whose agents and switchovers do at once what they are asked.

use slotmesh_proto::agent::v1 as pb;
use slotmesh_topology::{
    Architecture, Handover, InstanceState, artifact::parse_name, instance::REPLACE_AFTER_S,
};

use super::*;
use crate::{
    detect::tests::{NOW, Stage},
    observe::NodeView,
    spec::{Copied, Spec, State},
    upkeep,
};

pub(super) const NEW: &str = "redis-8.2.3";
pub(super) const BAKE_MS: u64 = 60_000;

pub(crate) fn instance() -> Instance {
    Instance {
        id: "r".into(),
        name: "r".into(),
        architecture: Architecture::Standard,
        shard_count: 1,
        replicas_per_shard: 2,
        databases: 256,
        engine: String::new(),
        secret: vec![1; 32],
        password_sha256: Vec::new(),
        state: InstanceState::Running,
        proxies: Vec::new(),
        gone_proxies: Vec::new(),
        workers_per_proxy: 1,
        created_unix_ms: 0,
        parameters: Default::default(),
        parameters_version: 0,
        proxy_parameters: Default::default(),
        accounts: Vec::new(),
        durability: 0,
        maintenance_window: String::new(),
        auto_upgrade: None,
        held_back: None,
        replace_after_s: REPLACE_AFTER_S,
    }
}

/// A task of such an upgrade.
pub(crate) fn task() -> Task {
    Story::new(&options()).task
}

pub(super) fn options() -> Options {
    Options {
        to: parse_name(NEW).unwrap(),
        bake_ms: BAKE_MS,
        canary_shards: 1,
        parallel_shards: 1,
        finalize_by_operator: false,
        preserve_roles: false,
        in_window: false,
        allow_downtime: false,
        automatic: false,
        method: Method::Auto,
        max_hold_ms: HOLD_MS,
    }
}

/// An upgrade of a shard of three nodes: what each decision writes is the next one's record.
pub(super) struct Story {
    pub(super) stage: Stage,
    pub(super) task: Task,
    pub(super) instance: Instance,
    pub(super) owner: Owner,
    pub(super) trial: StepStatus,
    pub(super) opens_ms: Option<u64>,
    pub(super) room: Option<HostId>,
    pub(super) copied: Option<ShardId>,
    /// Switches come to this end.
    pub(super) switches: Phase,
    /// For how long each holds.
    pub(super) hold_us: u64,
    /// Hosts that are lost.
    pub(super) dead: Vec<HostId>,
    /// What was written, in order.
    pub(super) events: Vec<String>,
}

impl Story {
    pub(super) fn new(options: &Options) -> Self {
        Self::of(Stage::new(), options)
    }

    /// As [`Story::new`], of that shard.
    pub(super) fn of(mut stage: Stage, options: &Options) -> Self {
        for node in stage.fleet.nodes.values_mut() {
            node.version = "7.0.15".into();
            node.engine = Some(String::new());
            node.unexpected_errors = Some(0);
        }
        stage.look();
        let instance = instance();
        let shards = [stage.shard.clone()];
        let planned = plan(&instance, &shards, &stage.fleet, options, NOW).unwrap();
        let task = Task {
            id: "t".into(),
            instance: "r".into(),
            spec: Spec::Upgrade(planned.upgrade),
            state: State::Running,
            message: String::new(),
            created_ms: NOW,
            updated_ms: NOW,
            deadline_ms: u64::MAX,
            event_count: 0,
            cancel_requested: false,
            not_before_ms: 0,
            in_window: false,
            choice: None,
            trace_id: String::new(),
            copied: Copied::default(),
        };
        Self {
            stage,
            task,
            instance,
            owner: Owner::Free,
            trial: StepStatus::NotStarted,
            opens_ms: None,
            room: Some("spare".into()),
            copied: None,
            switches: Phase::Done,
            hold_us: 0,
            dead: Vec::new(),
            events: Vec::new(),
        }
    }

    pub(super) fn upgrade(&self) -> &Upgrade {
        match &self.task.spec {
            Spec::Upgrade(upgrade) => upgrade,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn part(&self) -> &ShardUpgrade {
        &self.upgrade().shards[0]
    }

    pub(super) fn view(&self) -> View<'_> {
        View {
            task: &self.task,
            upgrade: self.upgrade(),
            part: self.part(),
            shard: &self.stage.shard,
            instance: &self.instance,
            scene: self.stage.scene(),
            ages: by_clock(self.part(), self.stage.now_ms),
            owner: &self.owner,
            stage: &self.trial,
            opens_ms: self.opens_ms,
            room: self.room.as_ref(),
            copied: self.copied.as_ref(),
        }
    }

    pub(super) fn decide(&self) -> Decision {
        decide(self.view())
    }

    /// Decides and writes once; true when something has changed.
    pub(super) fn act(&mut self) -> bool {
        let decision = self.decide();
        let exchanging = self.stage.shard.members.iter();
        let exchanging = exchanging.filter(|m| m.exchange.is_some()).count();
        assert!(exchanging <= 1, "one at a time: {:?}", self.stage.shard);
        match &decision {
            Decision::Stage(_) => {
                self.trial = StepStatus::Done { committed: false };
                return true;
            }
            Decision::Drive => {
                self.switch();
                return true;
            }
            _ => {}
        }
        let Some(write) = write(self.view(), &decision).unwrap() else {
            return false;
        };
        self.trial = StepStatus::NotStarted;
        self.events.push(write.event.to_owned());
        match write.lock {
            Lock::Keep => {}
            Lock::Take => self.owner = Owner::Own,
            Lock::Free => self.owner = Owner::Free,
        }
        self.task = write.task;
        if let Some(shard) = write.shard {
            self.stage.shard = shard;
        }
        if matches!(decision, Decision::Recruit(_)) {
            self.room = Some(format!("spare-{}", self.events.len()).into());
        }
        true
    }

    /// Acts, or else time passes and agents do.
    pub(super) fn step(&mut self) {
        if !self.act() {
            self.agents();
        }
    }

    /// To the end of the shard's part, with a look after each step.
    pub(super) fn run_to_end(&mut self, mut look: impl FnMut(&Self)) {
        for _ in 0..2_000 {
            if self.part().phase.is_ended() {
                return;
            }
            self.step();
            look(self);
        }
        panic!("not at its end: {:?}, {:?}", self.part(), self.decide());
    }

    /// The machine of switchovers, all at once.
    pub(super) fn switch(&mut self) {
        let switch = self.part().switch.clone().unwrap();
        let now_ms = self.stage.now_ms;
        self.task = self
            .task
            .with_phase(&switch.shard, self.switches, "it is said so", now_ms);
        if self.switches != Phase::Done {
            return;
        }
        let hold_us = self.hold_us;
        self.task
            .edit_switch(&switch.shard, |s| s.hold_us = hold_us);
        let handover = Handover {
            task: "t".into(),
            target: switch.to.clone(),
            token: "x".into(),
            deadline_unix_ms: u64::MAX,
            max_hold_ms: 1_000,
        };
        let declared = self.stage.shard.declare(handover).unwrap();
        self.stage.shard = declared.commit(switch.from_epoch, "x").unwrap();
        self.follow(&switch.to.clone());
    }

    /// Everybody follows that primary.
    pub(super) fn follow(&mut self, primary: &NodeId) {
        let address = self.stage.shard.member(primary).unwrap().address.clone();
        for (node, seen) in &mut self.stage.fleet.nodes {
            let is_primary = node == primary;
            seen.role = Some(match is_primary {
                true => NodeRole::Primary,
                false => NodeRole::Replica,
            });
            seen.following = match is_primary {
                true => String::new(),
                false => address.clone(),
            };
        }
    }

    /// Agents do as they are told, and the leader keeps the record true.
    pub(super) fn agents(&mut self) {
        let shard = self.stage.shard.clone();
        let primary = self.stage.node(shard.primary.as_str()).clone();
        for member in shard
            .members
            .iter()
            .filter(|m| !self.dead.contains(&m.host))
        {
            let spec = assignment::node(&self.instance, &shard, member);
            let new = || started(&member.node, &spec, &primary);
            let nodes = &mut self.stage.fleet.nodes;
            let seen = nodes.entry(member.node.clone()).or_insert_with(new);
            self.stage.fleet.hosts.insert(member.host.clone());
            self.stage.fleet.leases.insert(member.host.clone());
            seen.assigned_membership = spec.membership;
            seen.assigned_epoch = shard.epoch;
            let users = spec.users.iter().map(|u| u.name.clone());
            seen.replication_users = users.filter(|u| u.starts_with("rp-")).collect();
            if member.leaving {
                seen.following = String::new();
            }
            if spec.may_exchange && seen.engine.as_ref() != Some(&spec.engine) {
                assert!(!member.in_sync && member.node != shard.primary);
                seen.run_id.push('+');
                seen.version = match spec.engine.as_str() {
                    "" => "7.0.15".into(),
                    engine => engine.trim_start_matches("redis-").to_owned(),
                };
                seen.engine = Some(spec.engine);
                seen.unexpected_errors = Some(0);
            }
        }
        self.keep();
    }

    /// The host of a node is lost, with all that it had to say.
    pub(super) fn lose(&mut self, node: &str) {
        let host = self.stage.member(node).host.clone();
        self.stage.fleet.hosts.remove(&host);
        self.stage.fleet.leases.remove(&host);
        self.stage.member(node).in_sync = false;
        self.stage.cut(node);
        self.dead.push(host);
        self.stage.pass(1);
    }

    /// Time passes, and whatever can be done is done.
    pub(super) fn settle(&mut self, looks: usize) {
        for _ in 0..looks {
            while self.act() {}
            self.agents();
        }
    }

    pub(super) fn keep(&mut self) {
        self.stage.pass(100);
        while let Some((next, _)) = upkeep::decide(&self.stage.shard, self.stage.scene()) {
            self.stage.shard = next;
        }
    }

    /// Until the shard is in that phase.
    pub(super) fn run_to(&mut self, phase: UpgradePhase) -> &mut Self {
        for _ in 0..2_000 {
            if self.part().phase == phase {
                return self;
            }
            self.step();
        }
        panic!("not in {phase:?}: {:?}, {:?}", self.part(), self.decide());
    }

    /// Until the record says that the node is to run what it ran before, while its agent says nothing.
    pub(super) fn run_until_undone(&mut self, node: &str) {
        for _ in 0..10 {
            let member = self.stage.member(node);
            if member.exchange.is_some() && member.engine.is_empty() {
                return;
            }
            assert!(self.act(), "{:?}", self.decide());
        }
        panic!("not undone: {:?}", self.part());
    }

    pub(super) fn engines(&self) -> Vec<String> {
        let nodes = self.stage.fleet.nodes.values();
        nodes.map(|n| n.engine.clone().unwrap()).collect()
    }

    pub(super) fn ended(&self) -> (State, String) {
        ended(&self.task, self.upgrade()).unwrap()
    }
}

/// The process of a node that has joined: it has copied everything.
fn started(node: &NodeId, spec: &pb::NodeSpec, primary: &NodeView) -> NodeView {
    NodeView {
        run_id: format!("run-{node}"),
        address: format!("{node}:1"),
        role: Some(NodeRole::Replica),
        following: spec.primary_address.clone(),
        engine: Some(spec.engine.clone()),
        version: spec.engine.trim_start_matches("redis-").to_owned(),
        unexpected_errors: Some(0),
        ..primary.clone()
    }
}

/// The primary is lost; a failover takes the shard, makes `to` the primary and gives the shard back.
pub(super) fn fail_over(story: &mut Story, to: &str) {
    let by: TaskId = "f".into();
    let shard = story.stage.shard.id.clone();
    let next = crate::failover::supersede(&story.task, &shard, &by, story.stage.now_ms);
    story.task = next.expect("a failover may take the shard");
    story.owner = Owner::Other(by.clone());
    let lost = story.stage.shard.fail_over(&by, 0).unwrap();
    story.stage.shard = lost.clone();
    assert!(
        !story.act(),
        "the shard is another task's: {:?}",
        story.decide()
    );
    let proved = lost
        .prove(&by, slotmesh_topology::FenceProof::Exited)
        .unwrap();
    let run_id = lost.member(&to.into()).unwrap().run_id.clone();
    let chosen = proved.choose(&by, &to.into(), &run_id).unwrap();
    story.stage.shard = chosen.promoted(&by, &run_id, None).unwrap();
    story.follow(&to.into());
    story.owner = Owner::Free;
    story.keep();
}

/// Of one leader that has looked from the beginning, with a clock that does not jump.
pub(super) fn by_clock(part: &ShardUpgrade, now_ms: u64) -> Ages {
    let age = |since_ms: u64| now_ms.saturating_sub(since_ms);
    let behind_since_ms = part.rollback.as_ref().map(|r| r.behind_since_ms);
    Ages {
        phase_ms: age(part.phase_since_ms),
        whole_phase_ms: age(part.phase_since_ms),
        switch_ms: part.switch.as_ref().map_or(0, |s| age(s.phase_since_ms)),
        behind_ms: behind_since_ms.map_or(0, age),
    }
}
