//! What a worker counts, as others see it.
//!
//! Invariant: one writer (the worker, once per turn), any readers; nothing is counted on the path
//! of a command but plain integers.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::core::Counters;

/// A worker's counters, published.
#[derive(Debug, Default)]
pub struct Published {
    clients: AtomicU64,
    commands: AtomicU64,
    errors: AtomicU64,
    protocol_errors: AtomicU64,
    retries: AtomicU64,
    outcome_unknown: AtomicU64,
    unconfirmed: AtomicU64,
    hold_overdue: AtomicU64,
    overtaken: AtomicU64,
    held_requests: AtomicU64,
    held_max_us: AtomicU64,
    closed_backlog: AtomicU64,
    node_losses: AtomicU64,
    closed_subscribers: AtomicU64,
    subscriber_lines_lost: AtomicU64,
    subscriber_moves_forced: AtomicU64,
    departures_told: AtomicU64,
    departed: AtomicU64,
    departed_late: AtomicU64,
}

impl Published {
    /// Called by the worker at the end of a turn.
    pub fn store(&self, counters: &Counters, clients: usize) {
        self.clients.store(clients as u64, Relaxed);
        self.commands.store(counters.commands, Relaxed);
        self.errors.store(counters.errors, Relaxed);
        self.protocol_errors
            .store(counters.protocol_errors, Relaxed);
        self.retries.store(counters.retries, Relaxed);
        self.outcome_unknown
            .store(counters.outcome_unknown, Relaxed);
        self.unconfirmed.store(counters.unconfirmed, Relaxed);
        self.hold_overdue.store(counters.hold_overdue, Relaxed);
        self.overtaken.store(counters.overtaken, Relaxed);
        self.held_requests.store(counters.held_requests, Relaxed);
        self.held_max_us.store(counters.held_max_us, Relaxed);
        self.closed_backlog.store(counters.closed_backlog, Relaxed);
        self.node_losses.store(counters.node_losses, Relaxed);
        self.closed_subscribers
            .store(counters.closed_subscribers, Relaxed);
        let lost = counters.subscriber_lines_lost;
        self.subscriber_lines_lost.store(lost, Relaxed);
        let forced = counters.subscriber_moves_forced;
        self.subscriber_moves_forced.store(forced, Relaxed);
    }

    /// As [`Published::store`], of a worker whose clients are to go: others need not pay for it.
    pub fn store_departures(&self, counters: &Counters) {
        self.departures_told
            .store(counters.departures_told, Relaxed);
        self.departed.store(counters.departed, Relaxed);
        self.departed_late.store(counters.departed_late, Relaxed);
    }

    /// Clients of this worker.
    pub fn clients(&self) -> u64 {
        self.clients.load(Relaxed)
    }

    /// All counters.
    pub fn load(&self) -> Counters {
        Counters {
            commands: self.commands.load(Relaxed),
            errors: self.errors.load(Relaxed),
            protocol_errors: self.protocol_errors.load(Relaxed),
            retries: self.retries.load(Relaxed),
            outcome_unknown: self.outcome_unknown.load(Relaxed),
            unconfirmed: self.unconfirmed.load(Relaxed),
            hold_overdue: self.hold_overdue.load(Relaxed),
            overtaken: self.overtaken.load(Relaxed),
            held_requests: self.held_requests.load(Relaxed),
            held_max_us: self.held_max_us.load(Relaxed),
            closed_backlog: self.closed_backlog.load(Relaxed),
            node_losses: self.node_losses.load(Relaxed),
            closed_subscribers: self.closed_subscribers.load(Relaxed),
            subscriber_lines_lost: self.subscriber_lines_lost.load(Relaxed),
            subscriber_moves_forced: self.subscriber_moves_forced.load(Relaxed),
            departures_told: self.departures_told.load(Relaxed),
            departed: self.departed.load(Relaxed),
            departed_late: self.departed_late.load(Relaxed),
        }
    }
}
