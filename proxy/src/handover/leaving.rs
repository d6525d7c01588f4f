//! A process whose clients are to go elsewhere: all of them, because the controller says so (the
//! proxy moves to another host), or those that could not be passed to the process that relieved it.
//!
//! Invariants: who leaves for good accepts nobody from then on, and hands over to nobody; an order holds
//! until the process ends. Who was relieved forgets it when it serves again.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use slotmesh_proto::topology::v1 as topology;

use super::{Office, Role};
use crate::core::departing::{DEPARTURE_US, Elsewhere};
use crate::worker::{Pass, SendOff};

/// Those who can travel have travelled by then, however busy they are: each is tried three times a
/// second. Whoever is left cannot, and would only be closed at the end.
pub(super) const TRAVEL_LIMIT: Duration = Duration::from_secs(5);

/// The order by which the clients go.
#[derive(Debug)]
pub(crate) struct Leaving {
    elsewhere: Elsewhere,
    deadline: Instant,
    /// Of the newest order that was heard.
    number: u64,
}

impl Office {
    /// A number for an order that has just come: the newest counts.
    pub(crate) fn number_leave(&self) -> u64 {
        self.leave_orders.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The controller wants the clients elsewhere. Said again with the same address, it changes nothing;
    /// with another one, those who are left are told that, and have no more time.
    ///
    /// Not from an asynchronous task: it waits for room in the workers' inboxes.
    pub(crate) fn leave(&self, order: &topology::Leave, number: u64) {
        if self.role() != Role::Serving {
            return; // who serves is told, too
        }
        let elsewhere = match order.endpoint.as_str() {
            "" => Elsewhere::Anywhere,
            endpoint => Elsewhere::At(endpoint.to_owned()),
        };
        let within = match order.within_ms {
            0 => Duration::from_micros(DEPARTURE_US),
            ms => Duration::from_millis(ms.into()),
        };
        let mut leaving = self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = leaving.as_mut()
            && (before.number > number || before.elsewhere == elsewhere)
        {
            before.number = before.number.max(number);
            return;
        }
        let before = leaving.as_ref();
        let deadline = before.map_or_else(|| Instant::now() + within, |before| before.deadline);
        tracing::info!(
            endpoint = order.endpoint,
            clients = self.clients(),
            ?within,
            "its clients are to go elsewhere; it accepts no more"
        );
        *leaving = Some(Leaving {
            elsewhere: elsewhere.clone(),
            deadline,
            number,
        });
        self.counts.leaving.store(1, Ordering::Relaxed);
        self.stance.send_modify(|stance| stance.socket = None);
        self.send_off(Some(elsewhere), deadline);
    }

    /// True once the controller wants the clients elsewhere.
    pub(super) fn leaves(&self) -> bool {
        let leaving = self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        leaving.is_some()
    }

    /// Those who cannot be passed to the process that has relieved this one go there by themselves.
    pub(super) fn send_rest(&self, within: Duration) {
        if !self.sends_rest.swap(true, Ordering::Relaxed) {
            tracing::info!(
                left = self.clients(),
                "clients that cannot be handed over are to reconnect"
            );
            self.send_off(Some(Elsewhere::Here), Instant::now() + within);
        }
    }

    /// This process serves again: they may stay.
    pub(super) fn keep_rest(&self) {
        if self.sends_rest.swap(false, Ordering::Relaxed) {
            self.send_off(None, Instant::now());
        }
    }

    fn send_off(&self, elsewhere: Option<Elsewhere>, deadline: Instant) {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        // Libraries want a number that grows, and another one from each proxy.
        let number = since_epoch.unwrap_or_default().as_millis();
        let off = elsewhere.map(|elsewhere| SendOff {
            elsewhere,
            number: i64::try_from(number).unwrap_or(i64::MAX),
            deadline,
        });
        for worker in 0..self.workers.len() {
            self.pass(worker, Pass::Depart(off.clone()));
        }
    }
}
