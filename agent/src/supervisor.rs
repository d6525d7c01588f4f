//! Which nodes and proxies this host has: one worker each, told what the newest assignment says.
//!
//! Invariant: what an assignment does not name is left alone; workers end only when their node is
//! removed and no longer named, or with the agent.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use slotmesh_proto::agent::v1::{Assignment, Desired};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    host::{Host, is_id},
    node::{
        Assigned,
        worker::{Farewell, NodeCall, NodeHandle},
    },
    proxy::ProxyHandle,
};

/// All workers of the host.
#[derive(Debug)]
pub struct Supervisor {
    host: Arc<Host>,
    workers: Mutex<Workers>,
}

#[derive(Debug, Default)]
struct Workers {
    nodes: HashMap<String, NodeHandle>,
    proxies: HashMap<String, ProxyHandle>,
}

impl Supervisor {
    /// Starts a worker for everything that is on this host already.
    pub fn start(host: Arc<Host>) -> Arc<Self> {
        let mut workers = Workers::default();
        for node_id in ids_in(&host.nodes_dir) {
            let handle = NodeHandle::start(host.clone(), node_id.clone());
            workers.nodes.insert(node_id, handle);
        }
        for proxy_id in ids_in(&host.proxies_dir) {
            let handle = ProxyHandle::start(host.clone(), proxy_id.clone());
            workers.proxies.insert(proxy_id, handle);
        }
        Arc::new(Self {
            host,
            workers: Mutex::new(workers),
        })
    }

    /// Applies assignments until `stop`.
    pub async fn run(
        &self,
        mut assignments: watch::Receiver<Option<Arc<Assignment>>>,
        stop: CancellationToken,
    ) {
        loop {
            let assignment = assignments.borrow_and_update().clone();
            if let Some(assignment) = assignment {
                for retired in self.apply(&assignment) {
                    retired.stop(Farewell::LeaveRunning).await;
                }
            }
            tokio::select! {
                () = stop.cancelled() => return,
                changed = assignments.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Where calls for a node go.
    pub fn calls_of(&self, node_id: &str) -> Option<mpsc::Sender<NodeCall>> {
        self.lock()
            .nodes
            .get(node_id)
            .map(|handle| handle.calls.clone())
    }

    /// Tells every worker; gives back those that have nothing left to do.
    fn apply(&self, assignment: &Assignment) -> Vec<NodeHandle> {
        let mut workers = self.lock();
        for spec in &assignment.nodes {
            if !is_id(&spec.node_id) {
                tracing::error!(node = %spec.node_id, "assignment names a node that is no id");
                continue;
            }
            let handle = workers
                .nodes
                .entry(spec.node_id.clone())
                .or_insert_with(|| NodeHandle::start(self.host.clone(), spec.node_id.clone()));
            handle.assign(Assigned {
                term: assignment.term,
                revision: assignment.revision,
                spec: spec.clone(),
            });
        }
        for spec in &assignment.proxies {
            if !is_id(&spec.proxy_id) {
                tracing::error!(proxy = %spec.proxy_id, "assignment names a proxy that is no id");
                continue;
            }
            let handle = workers
                .proxies
                .entry(spec.proxy_id.clone())
                .or_insert_with(|| ProxyHandle::start(self.host.clone(), spec.proxy_id.clone()));
            handle.assign(spec.clone());
        }
        self.retire(&mut workers, assignment)
    }

    /// A removed node or proxy is reported for as long as the assignment names it, so that no report
    /// of its end can be missed.
    fn retire(&self, workers: &mut Workers, assignment: &Assignment) -> Vec<NodeHandle> {
        let named = |id: &str| assignment.nodes.iter().any(|spec| spec.node_id == id);
        let over: Vec<String> = workers
            .nodes
            .iter()
            .filter(|(id, handle)| !named(id) && is_removed(handle))
            .map(|(id, _)| id.clone())
            .collect();
        let mut retired = vec![];
        for id in over {
            retired.extend(workers.nodes.remove(&id));
            self.host.reports.forget_node(&id);
        }
        let named = |id: &str| assignment.proxies.iter().any(|spec| spec.proxy_id == id);
        let reports = &self.host.reports;
        workers.proxies.retain(|id, handle| {
            let over = !named(id) && handle.is_removed();
            if over {
                reports.forget_proxy(id);
            }
            !over
        });
        retired
    }

    /// Ends all workers: proxies first, so that no client sees a node go.
    pub async fn stop(&self, farewell: Farewell) {
        let workers = std::mem::take(&mut *self.lock());
        let mut ending = tokio::task::JoinSet::new();
        for handle in workers.proxies.into_values() {
            ending.spawn(handle.stop(farewell));
        }
        ending.join_all().await;
        let mut ending = tokio::task::JoinSet::new();
        for handle in workers.nodes.into_values() {
            ending.spawn(handle.stop(farewell));
        }
        ending.join_all().await;
    }

    fn lock(&self) -> MutexGuard<'_, Workers> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_removed(handle: &NodeHandle) -> bool {
    handle
        .assigned
        .borrow()
        .as_ref()
        .is_some_and(|a| a.spec.desired() == Desired::Removed)
}

pub fn ids_in(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return vec![];
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter(|name| is_id(name)).collect()
}
