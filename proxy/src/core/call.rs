//! What a worker asks of the rest of the process: its peers, and through it the controller.
//!
//! Invariant: each call is answered exactly once with one RESP2 frame, and never waits for ever: who
//! carries it answers with an error when its time is over.

use slotmesh_resp::write;

use super::Core;

/// A question to others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// The same to every worker of the process, the asking one too. The answer is an array of their
    /// answers.
    Peers(PeerRequest),
    /// Stores users of clients; answered once this process has them.
    Accounts {
        /// Name and rules of each.
        set: Vec<(String, Vec<String>)>,
        removed: Vec<String>,
    },
    /// Stores parameters; answered once this process has them.
    Parameters {
        engine: Vec<(String, String)>,
        proxy: Vec<(String, String)>,
    },
}

/// A command that concerns clients of all workers, such as CLIENT LIST.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerRequest {
    /// Id of the client that asks.
    pub client_id: u64,
    pub words: Vec<Vec<u8>>,
}

/// Where an answer belongs: a job of the asking worker, and the request's place in its round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    pub job: u32,
    pub index: u32,
}

impl Core {
    /// Answers a question of this or another worker with one RESP2 frame.
    pub fn peer_request(&mut self, request: &PeerRequest) -> Vec<u8> {
        if let Some(reply) = self.peer_clients(request) {
            return reply;
        }
        if let Some(reply) = self.peer_monitor(request) {
            return reply;
        }
        if let Some(reply) = self.peer_tracking(request) {
            return reply;
        }
        if let Some(reply) = self.peer_info(request) {
            return reply;
        }
        let mut reply = Vec::new();
        let name = request
            .words
            .first()
            .map_or("", |word| std::str::from_utf8(word).unwrap_or_default());
        tracing::error!(command = name, "a question that no worker knows");
        write::write_error(&mut reply, "ERR slotmesh: unknown question");
        reply
    }
}
