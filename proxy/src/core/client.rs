//! One client: what must survive a hand-over to another process, and what is only of this moment.
//!
//! Invariant: [`ClientState`] is plain data and complete: with it, the descriptor and nothing in
//! flight, another process can go on as if nothing had happened.

use std::net::SocketAddr;

use prost::Message as _;
use slotmesh_proto::handover::v1 as pb;
use slotmesh_resp::{Protocol, RequestParser};

use super::stash::Stash;

/// Schema of the written form. A reader refuses a higher one.
const SCHEMA: u32 = 1;

/// Commands queued since MULTI.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    /// Raw frames, one after the other.
    pub frames: Vec<u8>,
    pub commands: u32,
    /// A command was refused: EXEC must abort.
    pub dirty: bool,
    /// The shard of the keys so far.
    pub shard_id: Option<String>,
    /// Every command so far only reads.
    pub read_only: bool,
}

/// What a client called itself. Rare, so boxed away from the common case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    pub name: Vec<u8>,
    pub library_name: Vec<u8>,
    pub library_version: Vec<u8>,
}

/// All that the proxy knows of a client between two commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientState {
    pub id: u64,
    pub peer: Option<SocketAddr>,
    pub db: u16,
    pub protocol: Protocol,
    pub authenticated: bool,
    pub names: Option<Box<Names>>,
    pub transaction: Option<Box<Transaction>>,
    /// Received and not executed.
    pub input: Vec<u8>,
    /// Replies that were not sent yet.
    pub output: Vec<u8>,
    pub connected_unix_ms: u64,
}

/// Bytes that are not a client's state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("the client's state is not readable")]
    Decode(#[from] prost::DecodeError),
    #[error("the client's state has schema {0}; this release knows {SCHEMA}")]
    Schema(u32),
    #[error("the client's state has no valid {0}")]
    Field(&'static str),
}

impl ClientState {
    /// A client that has just connected.
    #[must_use]
    pub fn new(id: u64, peer: Option<SocketAddr>, connected_unix_ms: u64) -> Self {
        Self {
            id,
            peer,
            db: 0,
            protocol: Protocol::Resp2,
            authenticated: false,
            names: None,
            transaction: None,
            input: Vec::new(),
            output: Vec::new(),
            connected_unix_ms,
        }
    }

    /// Its names, for writing.
    pub fn names_mut(&mut self) -> &mut Names {
        self.names.get_or_insert_default()
    }

    /// The written form, a contract between proxy processes of any two releases.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let names = self.names.as_deref().cloned().unwrap_or_default();
        pb::ClientState {
            schema: SCHEMA,
            id: self.id,
            peer: self.peer.map(|p| p.to_string()).unwrap_or_default(),
            database: u32::from(self.db),
            resp3: self.protocol == Protocol::Resp3,
            authenticated: self.authenticated,
            user: "default".to_owned(),
            name: names.name,
            library_name: names.library_name,
            library_version: names.library_version,
            transaction: self.transaction.as_deref().map(|t| pb::Transaction {
                frames: t.frames.clone(),
                commands: t.commands,
                dirty: t.dirty,
                shard_id: t.shard_id.clone().unwrap_or_default(),
                read_only: t.read_only,
            }),
            input: self.input.clone(),
            output: self.output.clone(),
            connected_unix_ms: self.connected_unix_ms,
        }
        .encode_to_vec()
    }

    /// Reads the written form.
    ///
    /// # Errors
    /// When it is damaged, or of a newer schema.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let state = pb::ClientState::decode(bytes)?;
        if state.schema == 0 || state.schema > SCHEMA {
            return Err(StateError::Schema(state.schema));
        }
        let peer = match state.peer.as_str() {
            "" => None,
            peer => Some(peer.parse().map_err(|_| StateError::Field("peer"))?),
        };
        let names = Names {
            name: state.name,
            library_name: state.library_name,
            library_version: state.library_version,
        };
        Ok(Self {
            id: state.id,
            peer,
            db: u16::try_from(state.database).map_err(|_| StateError::Field("database"))?,
            protocol: if state.resp3 {
                Protocol::Resp3
            } else {
                Protocol::Resp2
            },
            authenticated: state.authenticated,
            names: (names != Names::default()).then(|| Box::new(names)),
            transaction: state.transaction.map(|t| {
                Box::new(Transaction {
                    frames: t.frames,
                    commands: t.commands,
                    dirty: t.dirty,
                    shard_id: Some(t.shard_id).filter(|s| !s.is_empty()),
                    read_only: t.read_only,
                })
            }),
            input: state.input,
            output: state.output,
            connected_unix_ms: state.connected_unix_ms,
        })
    }
}

/// Why a client is not read at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// It is read.
    None,
    /// It has too much in flight or unsent.
    Full,
    /// Its next command waits for room in a queue.
    Stalled,
    /// Its next command waits until nothing of it is in flight.
    Quiet,
    /// It leaves once its replies are sent.
    Leaving,
}

/// A client of this worker.
#[derive(Debug)]
pub struct Client {
    pub state: ClientState,
    pub generation: u32,
    /// The oldest request without a reply.
    pub head: u32,
    /// The next request.
    pub tail: u32,
    /// How far `state.output` was sent.
    pub sent: usize,
    pub pause: Pause,
    /// In the list of clients with something to send.
    pub touched: bool,
    pub parser: RequestParser,
    pub stash: Option<Box<Stash>>,
}

impl Client {
    pub fn in_flight(&self) -> u32 {
        self.tail.wrapping_sub(self.head)
    }

    pub fn unsent(&self) -> usize {
        self.state.output.len() - self.sent
    }

    /// Bytes that wait to be sent, in order or not.
    pub fn backlog(&self) -> usize {
        self.unsent() + self.stash.as_ref().map_or(0, |s| s.bytes_len())
    }

    /// Numbers the next request.
    #[inline]
    pub fn next_seq(&mut self) -> u32 {
        let seq = self.tail;
        self.tail = self.tail.wrapping_add(1);
        seq
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_survives_being_written_and_read_back() {
        let mut state = ClientState::new(7, Some("127.0.0.1:5000".parse().unwrap()), 1_700_000);
        assert_eq!(ClientState::decode(&state.encode()).unwrap(), state);
        state.db = 255;
        state.protocol = Protocol::Resp3;
        state.authenticated = true;
        state.names_mut().name = b"worker".to_vec();
        state.input = b"*2\r\n$3\r\nGE".to_vec();
        state.output = vec![0xff, 0, b'\r'];
        state.transaction = Some(Box::new(Transaction {
            frames: b"*1\r\n$4\r\nPING\r\n".to_vec(),
            commands: 1,
            dirty: true,
            shard_id: Some("0".to_owned()),
            read_only: true,
        }));
        assert_eq!(ClientState::decode(&state.encode()).unwrap(), state);
    }

    #[test]
    fn a_newer_or_damaged_state_is_refused() {
        let newer = pb::ClientState {
            schema: SCHEMA + 1,
            ..Default::default()
        };
        let error = ClientState::decode(&newer.encode_to_vec()).unwrap_err();
        assert!(matches!(error, StateError::Schema(2)), "{error}");
        assert!(ClientState::decode(b"\xff\xff\xff").is_err());
    }
}
