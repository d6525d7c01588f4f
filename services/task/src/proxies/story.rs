//! For tests: a change of proxies whose agents do what placements say, each decision made from records
//! that were written and read again.

use std::collections::BTreeSet;

use slotmesh_proto::{store::v1 as store, topology::v1 as topology};
use slotmesh_topology::{HostId, ProxyId, wire as model};

use super::*;
use crate::{
    detect::tests::{NOW, Stage},
    observe::{HoldLevel, ProxyHandover, ProxyView},
    spec::{Copied, Spec, State},
    wire,
};

pub(super) const NEW: &str = "proxy-0.2.0";
pub(super) const NAMES: [&str; 3] = ["pa", "pb", "pc"];

pub(super) fn options() -> Options {
    Options {
        program: Some(NEW.into()),
        proxies: Vec::new(),
        bake_ms: BAKE_MS,
        in_window: false,
        rebuild: None,
        workers: 0,
    }
}

pub(super) struct Story {
    pub(super) stage: Stage,
    pub(super) instance: Instance,
    pub(super) task: Task,
    pub(super) opens_ms: Option<u64>,
    /// Since when its controller leads.
    pub(super) since_ms: u64,
    /// Programs that these proxies' agents can't hand over to.
    pub(super) fails: BTreeSet<(&'static str, &'static str)>,
    /// Proxies whose agents do nothing.
    pub(super) idle: BTreeSet<&'static str>,
    /// Hosts that are away: nobody hears their agents and proxies.
    pub(super) away: BTreeSet<&'static str>,
    /// Clients of proxies that are told to leave do not go.
    pub(super) stays: bool,
    /// Processes that were told to leave do not hear that they may stay.
    pub(super) deaf: bool,
    /// Processes that take no more clients.
    pub(super) left: BTreeSet<u32>,
    pub(super) events: Vec<String>,
    pids: u32,
}

impl Story {
    /// Three proxies of an instance, each on a host of its own, all well.
    pub(super) fn new(options: &Options) -> Self {
        let mut story = Self::before();
        let planned = story.plan(options).unwrap();
        story.task.spec = Spec::Proxies(planned.changes);
        story
    }

    pub(super) fn before() -> Self {
        let placement = |name: &&str| store::ProxyPlacement {
            proxy_id: (*name).to_owned(),
            host_id: host_of(name),
            ..store::ProxyPlacement::default()
        };
        let instance = store::InstanceRecord {
            schema: 1,
            instance_id: "r".into(),
            architecture: topology::Architecture::Standard.into(),
            shard_count: 1,
            state: store::InstanceState::Running.into(),
            proxies: NAMES.iter().map(placement).collect(),
            ..store::InstanceRecord::default()
        };
        let mut stage = Stage::new();
        stage.fleet.proxies.clear();
        let task = Task {
            id: "t".into(),
            instance: "r".into(),
            spec: Spec::Provision,
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
        let mut story = Self {
            stage,
            instance: model::instance_from(&instance).unwrap(),
            task,
            opens_ms: None,
            since_ms: 0,
            fails: BTreeSet::new(),
            idle: BTreeSet::new(),
            away: BTreeSet::new(),
            stays: false,
            deaf: false,
            left: BTreeSet::new(),
            events: Vec::new(),
            pids: 0,
        };
        for name in NAMES {
            story.start(name, "", 0);
        }
        story
    }

    pub(super) fn plan(&self, options: &Options) -> Result<Planned, crate::admit::Refusal> {
        plan(
            &self.instance,
            &self.stage.fleet,
            &self.candidates(),
            options,
            self.stage.now_ms,
        )
    }

    /// Hosts with an agent.
    fn candidates(&self) -> Vec<Candidate> {
        let load = |host: &HostId| {
            let here = self.instance.proxies.iter().filter(|p| p.host == *host);
            here.count()
        };
        let hosts = self.stage.fleet.hosts.iter();
        hosts
            .map(|host| Candidate {
                host: host.clone(),
                load: load(host),
            })
            .collect()
    }

    /// The first proxy is the instance's only one, and there are no hosts of the others.
    pub(super) fn leave_alone(&mut self) {
        self.instance.proxies.truncate(1);
        let fleet = &mut self.stage.fleet;
        for name in &NAMES[1..] {
            fleet.hosts.remove(&HostId::from(host_of(name)));
        }
        fleet.proxies.retain(|proxy, _| proxy.as_str() == NAMES[0]);
        fleet
            .proxy_processes
            .retain(|proxy, _| proxy.as_str() == NAMES[0]);
    }

    /// A host, with all that runs there, is heard no more.
    pub(super) fn lose(&mut self, host: &'static str) {
        self.away.insert(host);
        let fleet = &mut self.stage.fleet;
        fleet.hosts.remove(&HostId::from(host));
        for placement in self
            .instance
            .proxies
            .iter()
            .filter(|p| p.host.as_str() == host)
        {
            fleet.proxies.remove(&placement.proxy);
        }
    }

    /// A process of the proxy serves, and says so.
    pub(super) fn start(&mut self, name: &str, program: &str, generation: u64) {
        self.pids += 1;
        let process = ProxyProcess {
            state: ProcessState::Running,
            pid: self.pids,
            program: Some(program.to_owned()),
            generation,
            version: match program {
                "" => "0.1.0".into(),
                program => program.trim_start_matches("proxy-").into(),
            },
            handover: Some(ProxyHandover {
                program: program.to_owned(),
                generation,
                clients: 7,
                took_us: 1_500,
                ..ProxyHandover::default()
            }),
            ..ProxyProcess::default()
        };
        let shard = &self.stage.shard;
        let route = (shard.epoch, HoldLevel::Applied, "".into());
        let view = ProxyView {
            instance: "r".into(),
            fresh: true,
            pid: process.pid,
            address: format!("{name}:6379"),
            clients: Some(if NAMES.contains(&name) { 7 } else { 0 }),
            shards: [(shard.id.clone(), route)].into(),
            ..ProxyView::default()
        };
        self.stage.fleet.proxies.insert(name.into(), view);
        self.stage
            .fleet
            .proxy_processes
            .insert(name.into(), process);
    }

    pub(super) fn process(&mut self, name: &str) -> &mut ProxyProcess {
        let processes = &mut self.stage.fleet.proxy_processes;
        processes.get_mut(&ProxyId::from(name)).unwrap()
    }

    pub(super) fn heard(&mut self, name: &str) -> &mut ProxyView {
        let proxies = &mut self.stage.fleet.proxies;
        proxies.get_mut(&ProxyId::from(name)).unwrap()
    }

    pub(super) fn placement(&self, name: &str) -> &Placement {
        let mut placements = self.instance.proxies.iter();
        placements.find(|p| p.proxy.as_str() == name).unwrap()
    }

    pub(super) fn changes(&self) -> &Changes {
        match &self.task.spec {
            Spec::Proxies(changes) => changes,
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn part(&self, name: &str) -> &Change {
        self.changes().part(&name.into()).unwrap()
    }

    pub(super) fn phases(&self) -> Vec<ProxyPhase> {
        self.changes().proxies.iter().map(|p| p.phase).collect()
    }

    /// The next write, of the first proxy that has one; `None`: all of them wait.
    pub(super) fn decided(&self) -> Option<(ProxyId, Write)> {
        // Whoever leads next knows no more than this.
        let task = wire::task_from(&wire::task_to(&self.task, 1)).unwrap();
        let instance = model::instance_from(&model::instance_to(&self.instance)).unwrap();
        assert_eq!((&task, &instance), (&self.task, &self.instance));
        let Spec::Proxies(changes) = &task.spec else {
            panic!("{task:?}")
        };
        let shards = [self.stage.shard.clone()];
        let candidates = self.candidates();
        changes.proxies.iter().find_map(|part| {
            let decision = decide(View {
                task: &task,
                changes,
                part,
                instance: &instance,
                shards: &shards,
                fleet: &self.stage.fleet,
                candidates: &candidates,
                now_ms: self.stage.now_ms,
                opens_ms: self.opens_ms,
                since_ms: self.since_ms,
            });
            match decision {
                Decision::Write(write) => Some((part.proxy.clone(), *write)),
                Decision::Wait { .. } => None,
            }
        })
    }

    /// One decision, written; `false`: all proxies wait.
    pub(super) fn act(&mut self) -> bool {
        if let Some((proxy, write)) = self.decided() {
            self.commit(proxy.as_str(), write);
            return true;
        }
        if let Some((state, message)) = ended(&self.task, self.changes()) {
            (self.task.state, self.task.message) = (state, message);
        }
        false
    }

    pub(super) fn commit(&mut self, proxy: &str, write: Write) {
        self.events.push(format!("{proxy} {}", write.event));
        self.task = write.task;
        if let Some(next) = write.placed.on(&self.instance, self.stage.now_ms) {
            self.instance = next;
        }
        let under_way = |p: &&Change| !p.phase.is_before() && !p.phase.is_ended();
        let changed = self.changes().proxies.iter().filter(under_way);
        assert!(changed.count() <= 1, "one at a time: {:?}", self.events);
    }

    /// Agents do what placements say.
    pub(super) fn converge(&mut self) -> bool {
        let mut acted = false;
        for gone in &self.instance.gone_proxies {
            let fleet = &mut self.stage.fleet;
            if !self.away.contains(gone.host.as_str()) {
                fleet.proxies.remove(&gone.proxy);
                fleet.proxy_processes.remove(&gone.proxy);
            }
        }
        for placement in self.instance.proxies.clone() {
            let name = placement.proxy.as_str();
            if self.idle.contains(name) || self.away.contains(placement.host.as_str()) {
                continue;
            }
            acted |= self.converge_one(name, &placement);
            let pid = self.process(name).pid;
            if placement.sends_away().is_none() {
                acted |= !self.deaf && self.left.remove(&pid);
                continue;
            }
            acted |= self.left.insert(pid);
            if !self.stays {
                acted |= self.heard(name).clients.replace(0) != Some(0);
            }
        }
        acted
    }

    fn converge_one(&mut self, name: &str, placement: &Placement) -> bool {
        let (program, generation) = (placement.program.as_str(), placement.generation);
        let Some(process) = self.stage.fleet.proxy_processes.get(&placement.proxy) else {
            let fails = self.fails.iter().any(|f| f.0 == name);
            self.start(name, program, generation);
            if fails {
                let process = self.process(name);
                process.state = ProcessState::Failed;
                process.error = "the sum is another one".into();
                self.stage.fleet.proxies.remove(&placement.proxy);
            }
            return true;
        };
        let asked = process.handover.as_ref();
        let is_tried = asked.is_some_and(|h| h.generation == generation && h.failed.is_some());
        let is_well = process.serves(program, generation);
        let never_ran = process.state == ProcessState::Failed && !NAMES.contains(&name);
        if is_well || is_tried || never_ran {
            return false;
        }
        let refuses = process.state == ProcessState::Running && self.left.contains(&process.pid);
        let why = match self.fails.iter().any(|f| f.0 == name && f.1 == program) {
            true => "the sum is another one",
            false if refuses && !placement.cold => "it is not to be relieved",
            false => {
                self.start(name, program, generation);
                return true;
            }
        };
        self.process(name).handover = Some(ProxyHandover {
            program: program.to_owned(),
            generation,
            failed: Some(why.into()),
            ..ProxyHandover::default()
        });
        true
    }

    /// Until nothing happens without time going by.
    pub(super) fn settle(&mut self) {
        for _ in 0..100 {
            let (acted, converged) = (self.act(), self.converge());
            if !acted && !converged {
                return;
            }
        }
        panic!("it does not come to rest: {:?}", self.events);
    }

    pub(super) fn pass(&mut self, ms: u64) {
        self.stage.now_ms += ms;
        self.settle();
    }

    /// Through every bake, to its end.
    pub(super) fn finish(&mut self) -> State {
        self.settle();
        for _ in 0..20 {
            if self.task.state.is_ended() {
                return self.task.state;
            }
            self.pass(BAKE_MS);
        }
        panic!("it does not end: {:?} {:?}", self.phases(), self.events);
    }

    /// Proxies that were told to be another process, in order.
    pub(super) fn handed_over(&self) -> Vec<&str> {
        let told = self.events.iter();
        told.filter_map(|e| e.strip_suffix(" HandOver")).collect()
    }
}

pub(super) fn host_of(name: &str) -> String {
    format!("host-{}", &name[1..])
}
