//! What others ask of a worker, through its inbox.
//!
//! Invariant: nothing here waits; what finds no room comes back to whoever gave it.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use tokio::sync::oneshot;

use super::{Accepted, Errand, INBOX, Pass, PeerRequest, Ticket, WorkerHandle};

impl WorkerHandle {
    /// Gives a client to the worker. It comes back if the worker takes none at the moment.
    #[must_use]
    pub fn give(&self, client: Accepted) -> Option<Accepted> {
        let back = self.put(client);
        if back.is_none() {
            self.wake();
        }
        back
    }

    /// As [`WorkerHandle::give`]; the worker looks when it is woken.
    pub(crate) fn put(&self, client: Accepted) -> Option<Accepted> {
        use std::sync::mpsc::TrySendError;
        // Before the send: the worker takes off what it takes out.
        self.waiting.fetch_add(1, Ordering::Relaxed);
        if self.waiting.load(Ordering::Relaxed) > INBOX as u64 {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            return Some(client);
        }
        match self.inbox.try_send(Errand::Client(Box::new(client))) {
            Ok(()) => None,
            Err(TrySendError::Full(errand) | TrySendError::Disconnected(errand)) => {
                self.waiting.fetch_sub(1, Ordering::Relaxed);
                match errand {
                    Errand::Client(client) => Some(*client),
                    _ => None,
                }
            }
        }
    }

    /// Asks the worker about its clients. `None` if it cannot take the question now.
    #[must_use]
    pub fn ask(&self, request: PeerRequest) -> Option<oneshot::Receiver<Vec<u8>>> {
        let (answer, answered) = oneshot::channel();
        self.inbox.try_send(Errand::Peer(request, answer)).ok()?;
        self.wake();
        Some(answered)
    }

    /// Gives the worker the answer to one of its calls. False if its inbox is full at the moment.
    #[must_use]
    pub fn answer(&self, ticket: Ticket, reply: Vec<u8>) -> bool {
        let sent = self.inbox.try_send(Errand::Answer(ticket, reply));
        self.wake();
        sent.is_ok()
    }

    /// Gives the worker its part of a hand-over. It comes back if the inbox is full at the moment.
    pub(crate) fn pass(&self, pass: Pass) -> Option<Pass> {
        use std::sync::mpsc::TrySendError;
        let sent = self.inbox.try_send(Errand::Pass(pass));
        self.wake();
        match sent {
            Err(TrySendError::Full(Errand::Pass(pass))) => Some(pass),
            _ => None, // one that has ended needs none
        }
    }

    /// Its clients, with those that wait in its inbox.
    #[must_use]
    pub fn load(&self) -> u64 {
        self.published.clients() + self.waiting.load(Ordering::Relaxed)
    }

    /// Makes it look at its inbox, the routing table and the stop flag.
    pub fn wake(&self) {
        if let Err(error) = self.waker.wake() {
            tracing::error!(%error, "a worker cannot be woken");
        }
    }

    /// Waits for its end, once it was told to stop. Whoever else has the handle does not matter.
    pub fn join(&self) {
        let thread = self.thread.lock();
        let thread = thread.unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a worker ended by a panic");
        }
    }
}
