//! One client: what must survive a hand-over to another process, and what is only of this moment.
//!
//! Invariant: [`ClientState`] is plain data and complete: with it, the descriptor and nothing in
//! flight, another process can go on as if nothing had happened.

use std::net::SocketAddr;

use prost::Message as _;
use slotmesh_command::Command;
use slotmesh_proto::handover::v1 as pb;
use slotmesh_resp::{Protocol, RequestParser};

use super::extra::Extra;
use super::maintenance::Wish;
use super::passing_looks::Looks;
use super::stash::Stash;

/// Highest schema of the written form that is understood. A state says the lowest that has room for
/// it, so that a process of an earlier release takes what it can keep.
pub const SCHEMA: u32 = 6;
/// What every client takes of a message, and each name in it, beside its own bytes.
pub(super) const STATE_BYTES: usize = 160;
pub(super) const NAME_BYTES: usize = 8;
/// The account of clients that name none.
pub const DEFAULT_USER: &str = "default";

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
    /// A command so far may change data, as CLIENT PAUSE WRITE sees it.
    pub may_change: bool,
    /// Not one block for one shard as it is.
    pub mixed: bool,
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
    /// Channels, patterns and shard channels, of a client that is between two processes.
    pub subscriptions: Option<Box<[Vec<Vec<u8>>; 3]>>,
    /// What it monitors and tracks, of a client that is between two processes.
    pub looks: Option<Box<Looks>>,
    /// Received and not executed.
    pub input: Vec<u8>,
    /// Replies that were not sent yet.
    pub output: Vec<u8>,
    pub connected_unix_ms: u64,
    /// `None`: `default`.
    pub user: Option<Box<str>>,
    pub no_evict: bool,
    pub no_touch: bool,
    /// It wants no replies.
    pub muted: bool,
    /// It wants no reply to the next command, of a client that is between two processes.
    pub skips_reply: bool,
    /// Since its last byte, of a client that is between two processes.
    pub idle_ms: u64,
    /// Name of its last command, of a client that is between two processes.
    pub last_command: Option<Box<str>>,
    /// It wants to be told before it must go elsewhere.
    pub moving: Option<Wish>,
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
            subscriptions: None,
            looks: None,
            input: Vec::new(),
            output: Vec::new(),
            connected_unix_ms,
            user: None,
            no_evict: false,
            no_touch: false,
            muted: false,
            skips_reply: false,
            idle_ms: 0,
            last_command: None,
            moving: None,
        }
    }

    /// The schema that its written form needs.
    #[must_use]
    pub fn schema(&self) -> u32 {
        match (&self.looks, self.skips_reply) {
            (Some(_), _) => 5,
            (None, true) => 2,
            (None, false) => 1,
        }
    }

    /// Bytes that its written form takes, as good as.
    #[must_use]
    pub fn bytes_len(&self) -> usize {
        let queued = self.transaction.as_ref().map_or(0, |t| t.frames.len());
        let names = self.names.as_ref();
        let names = names.map_or(0, |n| {
            n.name.len() + n.library_name.len() + n.library_version.len()
        });
        let subscribed = self.subscriptions.as_ref().map_or(0, |names| {
            names
                .iter()
                .flatten()
                .map(|name| NAME_BYTES + name.len())
                .sum()
        });
        let looks = self.looks.as_ref().map_or(0, |looks| looks.bytes_len());
        STATE_BYTES + self.input.len() + self.output.len() + queued + names + subscribed + looks
    }

    /// The account that it logged in with.
    #[must_use]
    pub fn user(&self) -> &str {
        self.user.as_deref().unwrap_or(DEFAULT_USER)
    }

    /// Its names, for writing.
    pub fn names_mut(&mut self) -> &mut Names {
        self.names.get_or_insert_default()
    }

    fn subscribed(&self, kind: usize) -> Vec<Vec<u8>> {
        let names = self.subscriptions.as_ref();
        names.map(|names| names[kind].clone()).unwrap_or_default()
    }

    /// The written form, a contract between proxy processes of any two releases.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        self.to_message().encode_to_vec()
    }

    /// The written form, as a part of a message.
    #[must_use]
    pub fn to_message(&self) -> pb::ClientState {
        let names = self.names.as_deref().cloned().unwrap_or_default();
        pb::ClientState {
            schema: self.schema(),
            id: self.id,
            peer: self.peer.map(|p| p.to_string()).unwrap_or_default(),
            database: u32::from(self.db),
            resp3: self.protocol == Protocol::Resp3,
            authenticated: self.authenticated,
            user: self.user().to_owned(),
            name: names.name,
            library_name: names.library_name,
            library_version: names.library_version,
            transaction: self.transaction.as_deref().map(|t| pb::Transaction {
                frames: t.frames.clone(),
                commands: t.commands,
                dirty: t.dirty,
                shard_id: t.shard_id.clone().unwrap_or_default(),
                read_only: t.read_only,
                mixed: t.mixed,
                may_change: Some(t.may_change),
            }),
            input: self.input.clone(),
            output: self.output.clone(),
            connected_unix_ms: self.connected_unix_ms,
            no_evict: self.no_evict,
            no_touch: self.no_touch,
            muted: self.muted,
            channels: self.subscribed(0),
            patterns: self.subscribed(1),
            shard_channels: self.subscribed(2),
            skips_reply: self.skips_reply,
            idle_ms: self.idle_ms,
            last_command: self.last_command.as_deref().unwrap_or_default().to_owned(),
            sources: self
                .looks
                .as_deref()
                .map(Looks::sources)
                .unwrap_or_default(),
            tracking: self.looks.as_deref().and_then(Looks::tracking),
            moving: Wish::told(self.moving).into(),
        }
    }

    /// Reads the written form.
    ///
    /// # Errors
    /// When it is damaged, or of a newer schema.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        Self::from_message(pb::ClientState::decode(bytes)?)
    }

    /// Reads the written form.
    ///
    /// # Errors
    /// When it is damaged, or of a newer schema.
    pub fn from_message(state: pb::ClientState) -> Result<Self, StateError> {
        let moving = Wish::read(state.moving());
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
                    // Older processes do not say: a pause holds it then, if it may write.
                    may_change: t.may_change.unwrap_or(!t.read_only),
                    mixed: t.mixed,
                })
            }),
            input: state.input,
            output: state.output,
            connected_unix_ms: state.connected_unix_ms,
            user: Some(state.user.as_str())
                .filter(|user| !user.is_empty() && *user != DEFAULT_USER)
                .map(Box::from),
            no_evict: state.no_evict,
            no_touch: state.no_touch,
            muted: state.muted,
            skips_reply: state.skips_reply,
            idle_ms: state.idle_ms,
            last_command: Some(state.last_command.as_str())
                .filter(|name| !name.is_empty())
                .map(Box::from),
            looks: Looks::read(state.sources, state.tracking)?,
            moving,
            subscriptions: Some(Box::new([
                state.channels,
                state.patterns,
                state.shard_channels,
            ]))
            .filter(|names| names.iter().any(|names| !names.is_empty())),
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
    /// A command of it waits at a node, on a connection of its own: if it goes away, the command is
    /// given up.
    Blocked,
    /// It leaves once its replies are sent.
    Leaving,
    /// It is on its way to another process.
    Frozen,
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
    /// By how much a request moves `tail`: 0 if the client wants no replies.
    step: u32,
    /// What replies must carry: the generation, or one that no client has.
    reply_generation: u32,
    /// How far `state.output` was sent.
    pub sent: usize,
    pub pause: Pause,
    /// In the list of clients with something to send.
    pub touched: bool,
    pub parser: RequestParser,
    pub stash: Option<Box<Stash>>,
    /// The address that it connected to.
    pub local: Option<SocketAddr>,
    /// It speaks TLS, so it looks at the name of whom it connects to.
    pub encrypted: bool,
    /// Something is sealed for it and not sent, or may be: it counts as sent here. The worker knows.
    pub sealed: bool,
    /// When bytes of it were last taken.
    pub heard_us: u64,
    pub last_command: Option<&'static Command>,
    /// Length of the last command's frame, up to what fits.
    pub last_bytes: u16,
    /// What few clients have. With it every command takes the long way.
    pub extra: Option<Box<Extra>>,
}

/// A generation that no client has.
pub(super) const NOBODY: u32 = 0;
/// In the generation of replies that are not sent, but become a part of EXEC's.
pub(super) const CAPTURED: u32 = 1 << 31;

impl Client {
    pub fn new(state: ClientState, generation: u32) -> Self {
        let unsent = !state.output.is_empty();
        let muted = state.muted;
        let mut client = Self {
            state,
            generation,
            head: 0,
            tail: 0,
            step: 1,
            reply_generation: generation,
            sent: 0,
            pause: Pause::None,
            touched: unsent,
            parser: RequestParser::default(),
            stash: None,
            local: None,
            encrypted: false,
            sealed: false,
            heard_us: 0,
            last_command: None,
            last_bytes: 0,
            extra: None,
        };
        client.set_muted(muted);
        client
    }

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

    /// Numbers the next request: the generation and number that its reply must carry. Those of a
    /// client that wants no replies belong to nobody.
    #[inline]
    pub fn ticket(&mut self) -> (u32, u32) {
        let seq = self.tail;
        self.tail = self.tail.wrapping_add(self.step);
        (self.reply_generation, seq)
    }

    /// Whether replies to the requests that are numbered from now on reach the client.
    pub fn set_muted(&mut self, muted: bool) {
        self.state.muted = muted;
        self.step = u32::from(!muted);
        self.reply_generation = if muted { NOBODY } else { self.generation };
    }

    /// From now on replies are captured, with this number (31 bits).
    pub(super) fn begin_capture(&mut self, number: u32) {
        self.set_muted(true);
        self.reply_generation = CAPTURED | number;
    }

    /// Replies reach the client again.
    pub(super) fn end_capture(&mut self) {
        if self.is_captured() {
            self.set_muted(false);
        }
    }

    pub(super) fn is_captured(&self) -> bool {
        self.reply_generation & CAPTURED != 0
    }

    pub fn is_muted(&self) -> bool {
        self.step == 0
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
        state.user = Some("ann".into());
        state.no_evict = true;
        state.skips_reply = true;
        state.moving = Some(Wish::ExternalFqdn);
        (state.idle_ms, state.last_command) = (7, Some("get".into()));
        state.input = b"*2\r\n$3\r\nGE".to_vec();
        state.output = vec![0xff, 0, b'\r'];
        state.subscriptions = Some(Box::new([vec![b"a".to_vec()], vec![], vec![vec![0xff]]]));
        state.looks = Some(Box::new(Looks::example()));
        state.transaction = Some(Box::new(Transaction {
            frames: b"*1\r\n$4\r\nPING\r\n".to_vec(),
            commands: 1,
            dirty: true,
            shard_id: Some("0".to_owned()),
            read_only: true,
            may_change: true,
            mixed: true,
        }));
        assert_eq!(ClientState::decode(&state.encode()).unwrap(), state);
    }

    #[test]
    fn a_state_is_as_large_as_all_that_it_carries() {
        let mut state = ClientState::new(7, None, 1);
        state.input = vec![0; 1000];
        state.output = vec![0; 2000];
        state.names_mut().name = vec![0; 3000];
        state.subscriptions = Some(Box::new([vec![vec![0; 4000]], vec![], vec![vec![0; 5000]]]));
        state.transaction = Some(Box::new(Transaction {
            frames: vec![0; 6000],
            ..Transaction::default()
        }));
        state.looks = Some(Box::new(Looks::example()));
        let (counted, written) = (state.bytes_len(), state.encode().len());
        assert!(
            (written..written + 500).contains(&counted),
            "{counted} {written}"
        );
    }

    #[test]
    fn a_newer_or_damaged_state_is_refused() {
        let newer = pb::ClientState {
            schema: SCHEMA + 1,
            ..Default::default()
        };
        let error = ClientState::decode(&newer.encode_to_vec()).unwrap_err();
        assert!(
            matches!(error, StateError::Schema(n) if n == SCHEMA + 1),
            "{error}"
        );
        assert!(ClientState::decode(b"\xff\xff\xff").is_err());
    }
}
