//! Acts on the right to serve: asks the replicas' agents, fences, and tells the fencer until when.
//!
//! Invariant: it waits for nobody. Asking and fencing run beside its looks, so that a peer or a node
//! that does not answer delays no other shard's fence; and what has no right is fenced again at
//! every look, in case a grant that was on its way came after the fence. The fencer watches from
//! before the first right is given until after the last one is seen to be gone.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use slotmesh_proto::agent::v1::{
    Assignment, NodeSpec, PromiseNotToPromoteRequest, agent_service_client::AgentServiceClient,
};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use super::{
    Boot, MARGIN, Right, TTL, is_guarded, millis,
    sever::{Depth, Severed, sever},
};
use crate::{
    fencer::client::{FencerClient, Pet, Watched},
    host::Host,
    node::files::NodeDir,
};

/// Between looks: a sixteenth of the margin by which rights end early.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Between two rounds of asking, while promises are alive.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// After a round in which one was missing.
const ASK_AGAIN: Duration = Duration::from_millis(150);
/// For an agent's answer: on hosts whose processors are wanted by many it passes through threads that
/// each wait their turn. A late one still counts from when it was asked for; and where an agent is
/// gone, a second try helps nobody.
const ASK_WITHIN: Duration = Duration::from_millis(900);
/// Between hosts of one mesh.
const CONNECT_WITHIN: Duration = Duration::from_millis(300);
/// From the soft fence to the hard one: a lease that comes back meanwhile breaks no connection.
const HARD_AFTER: Duration = Duration::from_millis(250);
/// How much of a right's margin the fencer lets pass before it looks by itself.
const FENCER_GRACE: Duration = MARGIN.saturating_sub(Duration::from_millis(300));

/// One host's guard.
#[derive(Debug)]
pub struct Guard {
    host: Arc<Host>,
    fencer: FencerClient,
    channels: BTreeMap<String, Channel>,
    /// By node: when its replicas' agents may be asked again.
    ask_at: BTreeMap<String, Boot>,
    fenced_since: BTreeMap<String, Boot>,
    /// Fenced nodes that were found without any right to take.
    bare: BTreeSet<String>,
    work: JoinSet<Done>,
    busy: BTreeSet<(Kind, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Ask,
    Sever,
}

#[derive(Debug)]
enum Done {
    /// Whether all have promised.
    Asked(String, bool),
    Severed(String, Severed),
}

impl Guard {
    pub fn new(host: Arc<Host>, fencer: FencerClient) -> Self {
        Self {
            host,
            fencer,
            channels: BTreeMap::new(),
            ask_at: BTreeMap::new(),
            fenced_since: BTreeMap::new(),
            bare: BTreeSet::new(),
            work: JoinSet::new(),
            busy: BTreeSet::new(),
        }
    }

    /// Looks until `stop`, then tells the fencer that the end was meant.
    pub async fn run(
        mut self,
        mut assignments: watch::Receiver<Option<Arc<Assignment>>>,
        stop: CancellationToken,
    ) {
        let mut tick = interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(done) = self.work.join_next() => {
                    self.done(done);
                    continue;
                }
                // A new primary waits for the fencer to know of it.
                Ok(()) = assignments.changed() => {}
                _ = tick.tick() => {}
            }
            let assignment = assignments.borrow_and_update().clone();
            if let Some(assignment) = assignment {
                self.look(&assignment);
            }
        }
        self.fencer.goodbye().await;
    }

    fn look(&mut self, assignment: &Assignment) {
        let guarded: Vec<&NodeSpec> = assignment.nodes.iter().filter(|s| is_guarded(s)).collect();
        self.forget_others(&guarded);
        let mut serving = BTreeSet::new();
        let now = Boot::now();
        let mut pet = Pet::default();
        for spec in guarded {
            let watched = |until: Boot| Watched {
                dir: NodeDir::locate(&self.host.nodes_dir, &spec.node_id),
                followers: spec.users.iter().filter(|u| u.replication).count(),
                until: until.plus(FENCER_GRACE),
            };
            match self.host.lease.right(spec, assignment.revision, now) {
                Right::Serve { until } => {
                    serving.insert(spec.node_id.clone());
                    pet.nodes.extend(until.map(watched));
                    self.lift(&spec.node_id);
                }
                Right::Ask { until } => {
                    serving.insert(spec.node_id.clone());
                    pet.nodes.push(watched(until));
                    self.lift(&spec.node_id);
                    self.ask(spec, now);
                }
                // What the agent of before has guarded stays guarded.
                Right::Unproven => {
                    pet.keep.push(watched(now).dir);
                    self.ask(spec, now);
                }
                Right::Fence => {
                    if !self.bare.contains(&spec.node_id) {
                        pet.keep.push(watched(now).dir);
                    }
                    self.fence(spec, now);
                }
            }
        }
        // Whoever may be a primary one day must not wait for a fencer's start then.
        let standby = assignment.nodes.iter().any(|s| s.epoch > 0);
        let watched = match self.fencer.pet(&pet, standby) {
            true => serving,
            false => &serving & &self.host.lease.watched(),
        };
        self.host.lease.set_watched(watched);
    }

    fn forget_others(&mut self, guarded: &[&NodeSpec]) {
        let names: BTreeSet<&str> = guarded.iter().map(|s| s.node_id.as_str()).collect();
        let agents: BTreeSet<&String> = guarded.iter().flat_map(|s| &s.replica_agents).collect();
        self.host.lease.retain(&names);
        self.ask_at.retain(|node, _| names.contains(node.as_str()));
        self.fenced_since
            .retain(|node, _| names.contains(node.as_str()));
        self.bare.retain(|node| names.contains(node.as_str()));
        self.channels.retain(|address, _| agents.contains(address));
    }

    fn lift(&mut self, node: &str) {
        if self.host.lease.set_fenced(node, false) {
            self.fenced_since.remove(node);
            self.bare.remove(node);
            tracing::info!(node, "the right to serve is back; fence lifted");
        }
    }

    fn fence(&mut self, spec: &NodeSpec, now: Boot) {
        let node = &spec.node_id;
        if self.host.lease.set_fenced(node, true) {
            tracing::warn!(
                node,
                epoch = spec.epoch,
                "no lease, and not every replica's agent promises: the shard is fenced until a \
                 controller that reaches its store is back"
            );
            self.host.metrics.self_fences.add(1);
        }
        let since = *self.fenced_since.entry(node.clone()).or_insert(now);
        if !self.busy.insert((Kind::Sever, node.clone())) {
            return;
        }
        let depth = match now >= since.plus(HARD_AFTER) {
            true => Depth::Hard,
            false => Depth::Soft,
        };
        let (host, node) = (self.host.clone(), node.clone());
        self.work.spawn(async move {
            let severed = sever(&host.nodes_dir, &node, depth).await;
            Done::Severed(node, severed)
        });
    }

    fn ask(&mut self, spec: &NodeSpec, now: Boot) {
        let node = spec.node_id.clone();
        let early = self.ask_at.get(&node).is_some_and(|at| now < *at);
        if early || !self.busy.insert((Kind::Ask, node.clone())) {
            return;
        }
        let request = PromiseNotToPromoteRequest {
            instance_id: spec.instance_id.clone(),
            shard_id: spec.shard_id.clone(),
            epoch: spec.epoch,
            ttl_ms: u32::try_from(millis(TTL)).unwrap_or(u32::MAX),
        };
        let agents = &spec.replica_agents;
        let channels: Vec<Option<Channel>> = agents.iter().map(|a| self.channel(a)).collect();
        let host = self.host.clone();
        self.work.spawn(async move {
            let words = Words::ask(channels, &request).await;
            if words.refused {
                host.lease.refused(&node);
            } else if words.all_promised {
                host.lease.promised_by_all(&node, request.epoch, now);
            }
            Done::Asked(node, words.all_promised)
        });
    }

    fn done(&mut self, done: Result<Done, tokio::task::JoinError>) {
        match done {
            Ok(Done::Asked(node, all)) => {
                self.busy.remove(&(Kind::Ask, node.clone()));
                let pause = if all { ASK_EVERY } else { ASK_AGAIN };
                self.ask_at.insert(node, Boot::now().plus(pause));
            }
            Ok(Done::Severed(node, severed)) => {
                self.busy.remove(&(Kind::Sever, node.clone()));
                if severed != Severed::Taken && self.fenced_since.contains_key(&node) {
                    self.bare.insert(node.clone());
                }
                match severed {
                    Severed::Already => {}
                    Severed::Taken => tracing::warn!(node, "rights taken"),
                    Severed::Killed => tracing::error!(
                        node,
                        "the node could not be fenced in time; its process was killed"
                    ),
                }
            }
            Err(error) => {
                tracing::error!(%error, "a task of the guard failed");
                self.busy.clear();
            }
        }
    }

    /// `None` for an agent whose address is not known.
    fn channel(&mut self, address: &str) -> Option<Channel> {
        if let Some(channel) = self.channels.get(address) {
            return Some(channel.clone());
        }
        if address.is_empty() {
            return None;
        }
        let channel = Endpoint::from_shared(format!("http://{address}"))
            .ok()?
            .connect_timeout(CONNECT_WITHIN)
            .tcp_nodelay(true)
            .connect_lazy();
        self.channels.insert(address.to_owned(), channel.clone());
        Some(channel)
    }
}

/// What the replicas' agents said.
#[derive(Debug, Clone, Copy)]
struct Words {
    all_promised: bool,
    /// One of them knows why not.
    refused: bool,
}

impl Words {
    async fn ask(channels: Vec<Option<Channel>>, request: &PromiseNotToPromoteRequest) -> Self {
        let mut words = Self {
            all_promised: true,
            refused: false,
        };
        let mut asking = JoinSet::new();
        for channel in channels {
            let Some(channel) = channel else {
                words.all_promised = false;
                continue;
            };
            let request = request.clone();
            asking.spawn(async move {
                let mut client = AgentServiceClient::new(channel);
                timeout(ASK_WITHIN, client.promise_not_to_promote(request)).await
            });
        }
        for answer in asking.join_all().await {
            match answer {
                Ok(Ok(answer)) => {
                    let answer = answer.into_inner();
                    words.all_promised &= answer.promised;
                    words.refused |= !answer.promised;
                }
                Ok(Err(_)) | Err(_) => words.all_promised = false,
            }
        }
        words
    }
}
