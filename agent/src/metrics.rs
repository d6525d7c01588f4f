//! What the agent counts.
//!
//! Plain integers, so that counting costs nothing; whoever exports them reads them.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters since the agent started.
#[derive(Debug, Default)]
pub struct Metrics {
    pub node_starts: Counter,
    pub node_adoptions: Counter,
    /// Replicas whose damaged files were moved aside.
    pub damaged_files: Counter,
    pub proxy_starts: Counter,
    pub proxy_adoptions: Counter,
    /// Another process of a proxy has taken over from the one that served.
    pub proxy_hand_overs: Counter,
    /// From its start to the listener, over all of these.
    pub proxy_hand_over_ms: Counter,
    /// The process of before has taken its clients back.
    pub proxy_taken_back: Counter,
    /// A proxy goes on with the process that it had.
    pub proxy_hand_overs_failed: Counter,
    pub steps: Counter,
    /// Answered from the journal: repeated, or from the past.
    pub steps_settled: Counter,
    /// Shards fenced because their primary's right to serve had run out.
    pub self_fences: Counter,
    pub hand_overs_done: Counter,
    pub hand_overs_undone: Counter,
    pub hand_overs_uncertain: Counter,
    /// Sum over all hand-overs that were done.
    pub critical_us: Counter,
}

#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Metrics {
    /// Every counter with its name, for an exporter.
    pub fn all(&self) -> [(&'static str, u64); 16] {
        [
            ("slotmesh_agent_node_starts_total", self.node_starts.get()),
            (
                "slotmesh_agent_node_adoptions_total",
                self.node_adoptions.get(),
            ),
            (
                "slotmesh_agent_damaged_files_total",
                self.damaged_files.get(),
            ),
            ("slotmesh_agent_proxy_starts_total", self.proxy_starts.get()),
            (
                "slotmesh_agent_proxy_adoptions_total",
                self.proxy_adoptions.get(),
            ),
            (
                "slotmesh_agent_proxy_hand_overs_total",
                self.proxy_hand_overs.get(),
            ),
            (
                "slotmesh_agent_proxy_hand_over_ms_total",
                self.proxy_hand_over_ms.get(),
            ),
            (
                "slotmesh_agent_proxy_taken_back_total",
                self.proxy_taken_back.get(),
            ),
            (
                "slotmesh_agent_proxy_hand_overs_failed_total",
                self.proxy_hand_overs_failed.get(),
            ),
            ("slotmesh_agent_steps_total", self.steps.get()),
            (
                "slotmesh_agent_steps_settled_total",
                self.steps_settled.get(),
            ),
            ("slotmesh_agent_self_fences_total", self.self_fences.get()),
            (
                "slotmesh_agent_hand_overs_done_total",
                self.hand_overs_done.get(),
            ),
            (
                "slotmesh_agent_hand_overs_undone_total",
                self.hand_overs_undone.get(),
            ),
            (
                "slotmesh_agent_hand_overs_uncertain_total",
                self.hand_overs_uncertain.get(),
            ),
            ("slotmesh_agent_critical_us_total", self.critical_us.get()),
        ]
    }
}
