//! Leases of hosts: a host may serve while its key is in the store.
//!
//! Invariant: whoever has a host's session keeps its key, and says so to its agent only after it has
//! seen the key with a lease that it has just renewed. A key that is there keeps its lease: a new
//! session takes the same one over, so that no lease of before ends sooner than its agent was told.
//! The end of a session ends no lease; only time does.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use slotmesh_proto::{
    agent::v1::{self as agent, session_response},
    store::v1::HostRecord,
};
use slotmesh_topology::{HostId, NodeRole, Shard};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{info, warn};

use crate::{
    hub::Hub,
    mirror::{Mirror, State},
    store::{
        LeaseId, Store, StoreError, Txn, TxnOutcome,
        keys::{self, Key},
    },
};

/// How long a host may serve on a word of ours, less the margin that its agent takes off.
pub const HOST_TTL: Duration = Duration::from_secs(3);
/// From a renewal to the first report that makes another: agents report every 250 ms, and need one in
/// 2.2 s.
const KEEP_SPACING: Duration = Duration::from_millis(400);
/// Takeovers that a renewal may lose to another session of the same host before it waits for the
/// next report.
const TRIES: usize = 4;

/// One session's hold on its host's lease.
#[derive(Debug)]
struct Keeper {
    store: Arc<dyn Store>,
    host: String,
    record: HostRecord,
    held: Option<Held>,
}

/// The key as this session wrote it.
#[derive(Clone, Copy, Debug)]
struct Held {
    lease: LeaseId,
    /// When the lease began.
    created: u64,
    /// When this session wrote its record.
    written: u64,
}

/// A renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kept {
    ttl: Duration,
    since: u64,
}

/// Keeps the lease of a session's host for as long as reports come, and answers them. `reported`
/// has the newest report's number; the session ends it.
pub(crate) async fn keep(
    store: Arc<dyn Store>,
    register: agent::Register,
    mut reported: watch::Receiver<u64>,
    answers: mpsc::Sender<Result<agent::SessionResponse, Status>>,
) {
    let mut keeper = Keeper::new(store, register);
    let mut complained = false;
    while reported.changed().await.is_ok() {
        let number = *reported.borrow_and_update();
        if number == 0 {
            // An agent of before there were leases.
            continue;
        }
        let not_before = Instant::now() + KEEP_SPACING;
        match keeper.renew().await {
            Ok(Some(kept)) => {
                complained = false;
                let kept = agent::LeaseKept {
                    report_number: number,
                    ttl_ms: u32::try_from(kept.ttl.as_millis()).unwrap_or(u32::MAX),
                    revision: kept.since,
                };
                let message = Some(session_response::Message::LeaseKept(kept));
                if answers
                    .send(Ok(agent::SessionResponse { message }))
                    .await
                    .is_err()
                {
                    return;
                }
            }
            Ok(None) => {}
            Err(error) => {
                if !std::mem::replace(&mut complained, true) {
                    warn!(host = keeper.host, %error, "the host's lease can't be kept");
                }
            }
        }
        sleep_until(not_before).await;
        // A report of before says nothing about now. Renewed by it, the lease of a host that has
        // died meanwhile would end that much later, and its agent would gain nothing by it.
        reported.mark_unchanged();
    }
}

impl Keeper {
    fn new(store: Arc<dyn Store>, register: agent::Register) -> Self {
        Self {
            store,
            host: register.host_id.clone(),
            record: HostRecord {
                schema: 0,
                host_id: register.host_id,
                agent_address: register.agent_address,
                advertise_ip: register.advertise_ip,
                agent_version: register.agent_version,
                agent_instance: register.agent_instance,
                engines: register.engines,
                zone: register.zone,
                lease: 0,
            },
            held: None,
        }
    }

    fn key(&self) -> String {
        Key::Host { host: &self.host }.to_string()
    }

    /// `None`: another session of this host was quicker each time.
    async fn renew(&mut self) -> Result<Option<Kept>, StoreError> {
        for _ in 0..TRIES {
            let Some(held) = self.held else {
                self.held = self.take().await?;
                continue;
            };
            match self.store.keep_alive(held.lease).await {
                Ok(ttl) => {
                    // Seen after the renewal: then the key has at least this time.
                    let item = self.store.get(&self.key()).await?;
                    if item.is_some_and(|item| item.mod_revision == held.written) {
                        let since = held.created;
                        return Ok(Some(Kept { ttl, since }));
                    }
                    self.held = None;
                }
                Err(StoreError::LeaseExpired { .. }) => self.held = None,
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Writes this session's record under the lease that the key has, or under a new one. `None`:
    /// look again.
    async fn take(&self) -> Result<Option<Held>, StoreError> {
        let key = self.key();
        let Some(item) = self.store.get(&key).await? else {
            return self.begin(key).await;
        };
        let found: HostRecord = keys::decode(&item)?;
        let lease = LeaseId::from_raw(found.lease);
        match self.store.keep_alive(lease).await {
            Ok(_) => {}
            // Its key is gone too, or is about to be.
            Err(StoreError::LeaseExpired { .. }) => return Ok(None),
            Err(error) => return Err(error),
        }
        let txn = Txn::new().unchanged(&*key, item.mod_revision).put_leased(
            &*key,
            self.record_with(lease),
            lease,
        );
        match self.store.txn(txn).await {
            Ok(TxnOutcome::Committed { revision }) => Ok(Some(Held {
                lease,
                created: item.create_revision,
                written: revision,
            })),
            Ok(TxnOutcome::Conflict) | Err(StoreError::LeaseExpired { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn begin(&self, key: String) -> Result<Option<Held>, StoreError> {
        let lease = self.store.grant_lease(HOST_TTL).await?;
        let txn = Txn::new()
            .absent(&*key)
            .put_leased(&*key, self.record_with(lease), lease);
        match self.store.txn(txn).await {
            Ok(TxnOutcome::Committed { revision }) => {
                info!(host = self.host, revision, "the host's lease begins");
                Ok(Some(Held {
                    lease,
                    created: revision,
                    written: revision,
                }))
            }
            Ok(TxnOutcome::Conflict) => {
                // Nothing has it; it would run out by itself too.
                self.store.revoke(lease).await?;
                Ok(None)
            }
            Err(StoreError::LeaseExpired { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn record_with(&self, lease: LeaseId) -> Vec<u8> {
        keys::encode(HostRecord {
            lease: lease.raw(),
            ..self.record.clone()
        })
    }
}

/// Shows the leader which hosts have a lease, until `stop`.
///
/// For the first [`HOST_TTL`] of this process every host passes for leased: a store inside it has
/// just forgotten the leases that hosts still trust.
pub(crate) async fn follow(mirror: Mirror, hub: Hub, stop: CancellationToken) {
    let presumed_until = Instant::now() + HOST_TTL;
    let mut state = mirror.subscribe();
    loop {
        let presumed = Instant::now() < presumed_until;
        let (leases, zones) = {
            let state = state.borrow_and_update();
            (leased(&state, presumed), zones(&state))
        };
        hub.hosts_known(leases, zones);
        tokio::select! {
            () = stop.cancelled() => return,
            changed = state.changed() => if changed.is_err() { return },
            () = sleep_until(presumed_until), if presumed => {}
        }
    }
}

fn leased(state: &State, presumed: bool) -> BTreeSet<HostId> {
    let leased = state.hosts.iter().filter(|(_, h)| h.leased_since.is_some());
    let mut leased: BTreeSet<HostId> = leased.map(|(id, _)| id.clone()).collect();
    if presumed {
        let members = state.shards.values().flat_map(|s| &s.value.members);
        leased.extend(members.map(|m| m.host.clone()));
    }
    leased
}

fn zones(state: &State) -> std::collections::BTreeMap<HostId, String> {
    let zones = state.hosts.iter();
    zones.map(|(id, h)| (id.clone(), h.zone.clone())).collect()
}

/// Agents whose promises together stand for the lease of a shard's primary: of every node that
/// could be promoted in its place. One whose address is not known is named by an empty string, so
/// that its promise is missed, not forgotten.
pub(crate) fn replica_agents(state: &State, shard: &Shard) -> Vec<String> {
    let others = shard.members.iter().filter(|m| m.node != shard.primary);
    let others = others.filter(|m| m.role != NodeRole::ReadOnly);
    let mut agents: Vec<String> = others
        .map(|m| {
            let host = state.hosts.get(&m.host);
            host.map(|h| h.agent_address.clone()).unwrap_or_default()
        })
        .collect();
    agents.sort();
    agents.dedup();
    agents
}

#[cfg(test)]
mod tests {
    use slotmesh_topology::{Epoch, Member, Mode, SlotRange};

    use super::*;
    use crate::{
        drive::write::{encode_shard, shard_key},
        store::EmbeddedStore,
    };

    fn shard() -> Shard {
        let member = |node: &str, role| Member {
            node: node.into(),
            host: format!("host-{node}").into(),
            role,
            run_id: String::new(),
            address: String::new(),
            in_sync: false,
            priority: slotmesh_topology::PRIORITY,
            leaving: false,
            engine: String::new(),
            exchange: None,
        };
        Shard {
            instance: "r-1".into(),
            id: "0".into(),
            index: 0,
            slots: Vec::<SlotRange>::new(),
            epoch: Epoch(1),
            primary: "a".into(),
            members: vec![
                member("a", NodeRole::Primary),
                member("b", NodeRole::Replica),
                member("c", NodeRole::Replica),
                member("d", NodeRole::ReadOnly),
            ],
            mode: Mode::Serving,
            closed_epoch: Epoch(0),
            departures: Vec::new(),
            roster: Default::default(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_replicas_agent_is_asked_by_its_address_even_after_its_hosts_lease_has_run_out() {
        let store = store();
        let (record, key) = (encode_shard(&shard()), shard_key(&shard()));
        let txn = Txn::new().put(key, record);
        assert!(store.txn(txn).await.is_ok());
        let register = agent::Register {
            host_id: "host-b".into(),
            agent_address: "b:1".into(),
            zone: "z".into(),
            ..agent::Register::default()
        };
        let mut host_b = Keeper::new(store.clone(), register);
        host_b.renew().await.unwrap();
        let stop = CancellationToken::new();
        let (mirror, _worker) = Mirror::start(store, stop.clone()).await.unwrap();
        let hub = Hub::default();
        let follower = tokio::spawn(follow(mirror.clone(), hub.clone(), stop.clone()));
        // `c` has not been seen: named by nothing, not left out. `d` is never promoted.
        let asked = mirror.read(|state| replica_agents(state, &shard()));
        assert_eq!(asked, ["", "b:1"]);
        let mut fleet = hub.subscribe();
        // All pass for leased at first, `b` until its time is over, then nobody.
        let leases = |n| move |f: &slotmesh_task::Fleet| f.leases.len() == n;
        fleet.wait_for(leases(4)).await.unwrap();
        fleet.wait_for(leases(0)).await.unwrap();
        assert_eq!(fleet.borrow().zones[&HostId::from("host-b")], "z");
        let asked = mirror.read(|state| replica_agents(state, &shard()));
        assert_eq!(asked, ["", "b:1"]);
        host_b.renew().await.unwrap();
        fleet.wait_for(leases(1)).await.unwrap();
        stop.cancel();
        follower.await.unwrap();
    }

    fn keeper(store: &Arc<dyn Store>, instance: &str) -> Keeper {
        let register = agent::Register {
            host_id: "h".into(),
            agent_instance: instance.into(),
            agent_address: format!("{instance}:1"),
            ..agent::Register::default()
        };
        Keeper::new(store.clone(), register)
    }

    fn store() -> Arc<dyn Store> {
        Arc::new(EmbeddedStore::in_memory())
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_lasts_through_sessions_and_begins_anew_only_after_its_end() {
        let store = store();
        let (mut old, mut new) = (keeper(&store, "x"), keeper(&store, "y"));
        let first = old.renew().await.unwrap().unwrap();
        assert_eq!(first.ttl, HOST_TTL);
        tokio::time::sleep(HOST_TTL / 2).await;
        assert_eq!(new.renew().await.unwrap().unwrap().since, first.since);
        // Renewed by the takeover.
        tokio::time::sleep(HOST_TTL * 3 / 4).await;
        let item = store.get("/slotmesh/host/h").await.unwrap().unwrap();
        let record: HostRecord = keys::decode(&item).unwrap();
        assert_eq!(record.agent_address, "y:1");
        tokio::time::sleep(HOST_TTL / 2).await;
        assert_eq!(store.get("/slotmesh/host/h").await.unwrap(), None);
        let next = new.renew().await.unwrap().unwrap();
        assert!(next.since > first.since);
    }

    #[tokio::test(start_paused = true)]
    async fn reports_keep_the_lease_and_are_answered_by_their_numbers() {
        let store = store();
        let (reported, numbers) = watch::channel(0);
        let (answers, mut answered) = mpsc::channel(4);
        let register = keeper(&store, "x").record;
        let register = agent::Register {
            host_id: register.host_id,
            ..agent::Register::default()
        };
        let kept = tokio::spawn(keep(store.clone(), register, numbers, answers));
        for number in [1, 7] {
            reported.send_replace(number);
            tokio::time::sleep(KEEP_SPACING / 2).await;
            // Too early for another renewal, and too old for the next one.
            reported.send_replace(number + 1);
            tokio::time::sleep(KEEP_SPACING).await;
            let answer = answered.recv().await.unwrap().unwrap();
            let Some(session_response::Message::LeaseKept(kept)) = answer.message else {
                panic!("a kept lease")
            };
            assert_eq!((kept.report_number, kept.ttl_ms), (number, 3_000));
            assert!(kept.revision > 0);
            assert!(answered.try_recv().is_err(), "a report of before");
        }
        drop(reported);
        kept.await.unwrap();
        assert!(store.get("/slotmesh/host/h").await.unwrap().is_some());
    }
}
