//! What this host observes, as its controllers are told.
//!
//! Invariant: each node and proxy that the agent looks after has exactly one entry, written only by
//! the worker that owns it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use slotmesh_proto::agent::v1::{HostReport, LostWrites, NodeReport, ProxyReport};
use tokio::sync::watch;

/// The newest report of everything.
#[derive(Debug)]
pub struct Reports {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: BTreeMap<String, NodeReport>,
    proxies: BTreeMap<String, ProxyReport>,
    lost: Vec<(PathBuf, LostWrites)>,
}

impl Default for Reports {
    fn default() -> Self {
        Self {
            inner: Mutex::default(),
            changed: watch::channel(0).0,
        }
    }
}

impl Reports {
    pub fn node(&self, report: NodeReport) {
        let mut inner = self.lock();
        let news = inner.nodes.get(&report.node_id).map(gist) != Some(gist(&report));
        inner.nodes.insert(report.node_id.clone(), report);
        drop(inner);
        self.bump(news);
    }

    pub fn proxy(&self, report: ProxyReport) {
        let mut inner = self.lock();
        let news = inner.proxies.get(&report.proxy_id) != Some(&report);
        inner.proxies.insert(report.proxy_id.clone(), report);
        drop(inner);
        self.bump(news);
    }

    /// Told for as long as its file is in `dir`.
    pub fn lost(&self, dir: &Path, lost: LostWrites) {
        let path = dir.join(&lost.file);
        let news = path.is_file();
        if news {
            self.lock().lost.push((path, lost));
        }
        self.bump(news);
    }

    /// The host has nothing to do with it any more.
    pub fn forget_node(&self, node_id: &str) {
        let gone = self.lock().nodes.remove(node_id).is_some();
        self.bump(gone);
    }

    pub fn forget_proxy(&self, proxy_id: &str) {
        let gone = self.lock().proxies.remove(proxy_id).is_some();
        self.bump(gone);
    }

    pub fn all(&self) -> HostReport {
        let mut inner = self.lock();
        // An operator who is done with a file deletes it.
        inner.lost.retain(|(path, _)| path.is_file());
        HostReport {
            nodes: inner.nodes.values().cloned().collect(),
            proxies: inner.proxies.values().cloned().collect(),
            lost_writes: inner.lost.iter().map(|(_, lost)| lost.clone()).collect(),
            ..HostReport::default()
        }
    }

    /// Counts changes that a controller wants to know at once.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn bump(&self, news: bool) {
        if news {
            self.changed.send_modify(|n| *n += 1);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A primary is heard every second; so long a silence makes a witness and is news, more of it is not.
const LINK_SILENT_S: u32 = 3;

/// Without what changes all the time; that goes with the periodic report.
fn gist(report: &NodeReport) -> NodeReport {
    NodeReport {
        offset: 0,
        used_memory: 0,
        keys: 0,
        replica_lag_bytes: 0,
        served: Vec::new(),
        link_silent_s: if report.link_silent_s < LINK_SILENT_S {
            0
        } else {
            LINK_SILENT_S
        },
        ..report.clone()
    }
}
