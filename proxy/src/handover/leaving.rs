//! A process whose clients are to go elsewhere: all of them, because the controller says so (the
//! proxy moves to another host), or those that could not be passed to the process that relieved it.
//!
//! Invariants: who leaves for good accepts nobody from then on, and hands over to nobody, until the
//! controller says that it stays. Who was relieved forgets it when it serves again.

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use slotmesh_proto::topology::v1 as topology;
use tokio::net::TcpListener;

use super::{Office, Role};
use crate::core::departing::{DEPARTURE_US, Elsewhere};
use crate::worker::{Pass, SendOff};

/// Those who can travel have travelled by then, however busy they are: each is tried three times a
/// second. Whoever is left cannot, and would only be closed at the end.
pub(super) const TRAVEL_LIMIT: Duration = Duration::from_secs(5);

/// Between tries to listen again: the acceptor shuts the socket of before in a moment, and whoever has
/// the port meanwhile may not have it for long.
const LISTEN_AGAIN: Duration = Duration::from_millis(50);

/// What was said about leaving.
#[derive(Debug, Default)]
pub(crate) struct Orders {
    /// Of the newest one that was heard.
    number: u64,
    leaving: Option<Leaving>,
}

/// The order by which the clients go.
#[derive(Debug)]
struct Leaving {
    elsewhere: Elsewhere,
    deadline: Instant,
    /// Where clients came in.
    listened: Option<SocketAddr>,
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
        let mut orders = self.orders();
        if orders.number > number {
            return;
        }
        orders.number = number;
        let before = orders.leaving.as_ref();
        if before.is_some_and(|before| before.elsewhere == elsewhere) {
            return;
        }
        let deadline = before.map_or_else(|| Instant::now() + within, |before| before.deadline);
        let listens = || self.stance.borrow().socket.as_ref()?.local_addr().ok();
        let listened = before.map_or_else(listens, |before| before.listened);
        tracing::info!(
            endpoint = order.endpoint,
            clients = self.clients(),
            ?within,
            "its clients are to go elsewhere; it accepts no more"
        );
        orders.leaving = Some(Leaving {
            elsewhere: elsewhere.clone(),
            deadline,
            listened,
        });
        self.counts.leaving.store(1, Ordering::Relaxed);
        self.stance.send_modify(|stance| stance.socket = None);
        self.send_off(Some(elsewhere), deadline);
    }

    /// The controller wants the clients here after all. Those that are left may stay, and others come.
    ///
    /// Not from an asynchronous task: it waits for its port, and for room in the workers' inboxes.
    pub(crate) fn stay(&self, number: u64) {
        let mut tries = 0;
        while let Err(error) = self.try_stay(number) {
            if self.stop.is_cancelled() {
                return;
            }
            tries += 1;
            if tries == 20 {
                tracing::warn!(%error, "it is to accept clients again, and can't listen yet");
            }
            std::thread::park_timeout(LISTEN_AGAIN);
        }
    }

    fn try_stay(&self, number: u64) -> std::io::Result<()> {
        let mut orders = self.orders();
        if orders.number > number {
            return Ok(());
        }
        orders.number = number;
        let Some(leaving) = &orders.leaving else {
            return Ok(());
        };
        if let Some(address) = leaving.listened {
            // Another socket than before: that one was shut, and is watched as such.
            let socket = std::net::TcpListener::bind(address)?;
            socket.set_nonblocking(true)?;
            let _runtime = self.runtime.enter();
            let socket = Arc::new(TcpListener::from_std(socket)?);
            self.stance
                .send_modify(|stance| stance.socket = Some(socket));
        }
        orders.leaving = None;
        tracing::info!(clients = self.clients(), "it accepts clients again");
        self.counts.leaving.store(0, Ordering::Relaxed);
        self.send_off(None, Instant::now());
        Ok(())
    }

    /// The controller wants the clients elsewhere.
    pub(crate) fn leaves(&self) -> bool {
        self.orders().leaving.is_some()
    }

    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
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
