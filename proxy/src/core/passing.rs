//! Clients on their way to another process: stopped at a command's boundary, told in full, and let go
//! on here if the other process does not take them.
//!
//! Invariants: of a client that is told nothing is in flight, so that its next command cannot overtake
//! an earlier one; a client that is let go on is as if it had never been stopped; one with a state that
//! cannot be told ([`Stay`]) is never stopped for long.

use std::collections::HashSet;

use slotmesh_resp::{Protocol, write};

use super::Core;
use super::client::{Client, ClientState, Names, Pause};
use super::sessions::CloseReason;

/// Longest time that a client is stopped for its replies: more would be noticed. What waits longer is
/// tried again later, so that nobody is stopped for most of the time.
pub const QUIET_LIMIT_US: u64 = 200_000;
/// The largest client that travels, in bytes of its input, output and queued commands: its message
/// must arrive within the time in which nobody serves it. Larger ones become smaller.
pub const TRAVEL_BYTES_MAX: usize = 16 * 1024 * 1024;

/// A client that was stopped.
#[derive(Debug)]
pub struct Frozen {
    pub slot: u32,
    pub generation: u32,
    before: Pause,
    since_us: u64,
    /// It listens to channels, and it is looked after what it hears.
    listens: bool,
}

impl Frozen {
    /// Its slot and generation.
    #[must_use]
    pub fn key(&self) -> (u32, u32) {
        (self.slot, self.generation)
    }

    /// When it was stopped, on the worker's clock.
    #[must_use]
    pub fn since_us(&self) -> u64 {
        self.since_us
    }
}

/// Why a client stays where it is, for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stay {
    /// It leaves.
    Leaving,
    /// It has what the other process would not understand, or cannot take yet.
    State,
    /// It has too much unsent or unfinished.
    Size,
}

/// How far a stopped client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// It can be told.
    Yes,
    /// Replies are to come.
    NotYet,
    /// It is gone, or cannot travel, or was stopped for too long.
    No,
}

impl Client {
    /// Whether all that it has can be told to a process that knows schemas up to this.
    fn may_travel(&self, schema_max: u32, listens: bool) -> Result<(), Stay> {
        let extra = self.extra.as_deref();
        let subscribes = extra.is_some_and(|extra| extra.subscriber.is_some());
        let looks = self.is_monitoring() || self.is_tracking();
        let pinned = (subscribes || self.is_monitoring()) != listens
            || (subscribes && schema_max < 4)
            || (looks && schema_max < 5);
        let at_nodes = extra.is_some_and(|extra| extra.wait.is_some() || extra.watching.is_some());
        let skips = extra.is_some_and(|extra| extra.skips_reply);
        if self.pause == Pause::Leaving {
            return Err(Stay::Leaving);
        }
        // The pause of a muted client may be all that is known of a command that still runs.
        let unknown = self.is_muted() && self.pause == Pause::Quiet;
        if pinned
            || unknown
            || self.is_captured()
            || (skips && schema_max < 2)
            || (at_nodes && schema_max < 3)
        {
            return Err(Stay::State);
        }
        let stashed = self.backlog() - self.unsent();
        let subscribed = extra.and_then(|extra| extra.subscriber.as_ref());
        let subscribed = subscribed.map_or(0, |subscriber| subscriber.bytes_len());
        if self.state.bytes_len() + stashed + subscribed > TRAVEL_BYTES_MAX {
            return Err(Stay::Size);
        }
        Ok(())
    }
}

impl Core {
    /// Whether all that a client has can be told now.
    pub(super) fn may_travel(&self, slot: u32, schema_max: u32, listens: bool) -> Result<(), Stay> {
        let client = self.sessions.get(slot).ok_or(Stay::Leaving)?;
        client.may_travel(schema_max, listens)?;
        let (wait_bytes, is_silent) = self.wait_facts(slot);
        if wait_bytes > TRAVEL_BYTES_MAX {
            return Err(Stay::Size);
        }
        // Who redirects to it goes first, or what it is told until then would be lost.
        let follows = client.redirection() <= 0 && self.pubsub.audience.is_target(client.state.id);
        if follows || (is_silent && schema_max < 5) {
            return Err(Stay::State);
        }
        Ok(())
    }

    /// Stops a client: nothing more of it is read or executed.
    ///
    /// # Errors
    /// Why it stays; then it was not stopped.
    pub fn freeze(&mut self, slot: u32, schema_max: u32, listens: bool) -> Result<Frozen, Stay> {
        self.may_travel(slot, schema_max, listens)?;
        let client = self.sessions.get_mut(slot).ok_or(Stay::Leaving)?;
        if client.pause == Pause::Frozen {
            return Err(Stay::State);
        }
        // WAIT and its kin end soon, or were told not to.
        let blocked = client.pause == Pause::Blocked;
        if blocked && self.wait_travels(slot) != Some(true) {
            return Err(Stay::State);
        }
        let client = self.sessions.get_mut(slot).ok_or(Stay::Leaving)?;
        let before = std::mem::replace(&mut client.pause, Pause::Frozen);
        Ok(Frozen {
            slot,
            generation: client.generation,
            before,
            since_us: self.now_us,
            listens,
        })
    }

    /// Lets a client that was stopped go on, with what it has sent already.
    pub fn thaw(&mut self, frozen: &Frozen) {
        let same = self.sessions.get_same(frozen.slot, frozen.generation);
        let Some(client) = same.filter(|client| client.pause == Pause::Frozen) else {
            return;
        };
        let waits = client.in_flight() > 0;
        let blocked = client
            .extra
            .as_ref()
            .is_some_and(|extra| extra.wait.is_some());
        // The next reply, or the end of the command that waits, looks whether that is over.
        if (waits && matches!(frozen.before, Pause::Full | Pause::Quiet))
            || (blocked && frozen.before == Pause::Blocked)
        {
            client.pause = frozen.before;
            return;
        }
        client.pause = Pause::None;
        self.sessions.resumed.push((frozen.slot, frozen.generation));
    }

    /// Clients of which something is at a node, or on its way there, whoever hears the reply.
    #[must_use]
    pub fn under_way(&self) -> HashSet<u32> {
        let lanes = self.lanes.numbers().map(|no| &self.lanes[no as usize]);
        let queues = lanes.flat_map(|lane| [&lane.flight, &lane.retry, &lane.held]);
        let entries = queues.flat_map(|queue| queue.entries());
        entries.map(|entry| entry.client).collect()
    }

    /// Whether a stopped client can be told now.
    #[must_use]
    pub fn settled(&self, frozen: &Frozen, schema_max: u32, under_way: &HashSet<u32>) -> Settled {
        let client = self.sessions.get(frozen.slot);
        let same = client.filter(|c| c.generation == frozen.generation);
        let Some(client) = same.filter(|client| client.pause == Pause::Frozen) else {
            return Settled::No;
        };
        let unheard = client.is_muted()
            && (self.jobs.has_one_of(frozen.slot) || self.weaves.has_one_of(frozen.slot));
        let waits = self.wait_travels(frozen.slot);
        // A command that waits at a node travels with its client; it is all that is in flight.
        let in_flight = client.in_flight() > 0 && waits != Some(true);
        let busy = in_flight || unheard || waits == Some(false) || under_way.contains(&frozen.slot);
        let late = frozen.since_us + QUIET_LIMIT_US <= self.now_us;
        match (busy, client.may_travel(schema_max, frozen.listens)) {
            (false, Ok(())) => Settled::Yes,
            (true, Ok(())) if !late => Settled::NotYet,
            _ => Settled::No,
        }
    }

    /// All that is known of a client. Only of one that is settled.
    #[must_use]
    pub fn parting_state(&self, slot: u32) -> Option<ClientState> {
        let client = self.sessions.get(slot)?;
        let extra = client.extra.as_deref();
        let idle_us = self.now_us.saturating_sub(client.heard_us);
        Some(ClientState {
            output: client.state.output[client.sent..].to_vec(),
            skips_reply: extra.is_some_and(|extra| extra.skips_reply),
            // What a skipped reply made of it comes back with it.
            muted: client.state.muted && !extra.is_some_and(|extra| extra.skips_reply),
            idle_ms: idle_us / 1000,
            last_command: client.last_command.map(|command| Box::from(command.name)),
            subscriptions: extra.and_then(|extra| {
                let names = &extra.subscriber.as_ref()?.names;
                let copied = |at: usize| names[at].iter().map(|name| name.to_vec()).collect();
                Some(Box::new([0, 1, 2].map(copied)))
            }),
            looks: self.looks_of(slot),
            ..client.state.clone()
        })
    }

    /// Takes in what another process has told of a client.
    pub(super) fn restore(&mut self, slot: u32) {
        let now_us = self.now_us;
        let known = self
            .sessions
            .get(slot)
            .is_some_and(|c| c.state.authenticated);
        let user = self.sessions.get(slot).map(|c| c.state.user().to_owned());
        let Some(client) = self.sessions.get_mut(slot) else {
            return;
        };
        client.heard_us = now_us.saturating_sub(client.state.idle_ms * 1000);
        let name = client.state.last_command.take();
        client.last_command = name.and_then(|name| {
            let mut words = name.split('|');
            let command = slotmesh_command::lookup(words.next()?.as_bytes())?;
            let second = words.next().map(|word| command.subcommand(word.as_bytes()));
            second.unwrap_or(Some(command))
        });
        if std::mem::take(&mut client.state.skips_reply) {
            client.set_muted(true);
            client.extra_mut().skips_reply = true;
        }
        if !client.state.input.is_empty() {
            let generation = client.generation;
            self.sessions.resumed.push((slot, generation));
        }
        // Its account was removed while it was between two processes.
        let gone = |user: &String| !self.is_user(user.as_bytes());
        if self.ready && known && user.as_ref().is_some_and(gone) {
            self.sessions.doom(slot, CloseReason::Killed);
        }
    }
}

/// The trial of a process before it takes over.
impl Core {
    /// Opens a client of each protocol that has no socket and may do everything, and asks for one key of
    /// every shard: so all connections stand when others' clients come. None: no topology is in force.
    pub fn begin_trial(&mut self) -> Vec<u32> {
        if !self.ready || self.table.all_shards().is_empty() {
            return Vec::new();
        }
        let protocols = [Protocol::Resp2, Protocol::Resp3];
        protocols.map(|protocol| self.open_trial(protocol)).into()
    }

    fn open_trial(&mut self, protocol: Protocol) -> u32 {
        let mut state = ClientState::new(0, None, self.now_unix_us / 1000);
        state.protocol = protocol;
        state.names = Some(Box::new(Names {
            name: b"slotmesh-trial".to_vec(),
            ..Names::default()
        }));
        let slot = self.sessions.open(state);
        if let Some(client) = self.sessions.get_mut(slot) {
            client.heard_us = self.now_us;
            client.state.authenticated = true;
        }
        let mut frames = Vec::new();
        write::encode_command(&mut frames, &[b"PING"]);
        for shard in self.table.all_shards() {
            let names = (0..).map(|number: u32| format!("slotmesh:trial:{number}"));
            /// A shard with fewer of the 16,384 slots than one in this many keys finds is not tried.
            const TRIES: usize = 100_000;
            let mut names = names.take(TRIES);
            if let Some(key) = names.find(|key| self.table.shard_of(key.as_bytes()) == shard) {
                write::encode_command(&mut frames, &[b"EXISTS", key.as_bytes()]);
            }
        }
        self.client_bytes(slot, &frames);
        slot
    }

    /// The replies to a trial, once all are there.
    #[must_use]
    pub fn trial_replies(&self, slot: u32) -> Option<&[u8]> {
        let client = self.sessions.get(slot)?;
        (client.in_flight() == 0).then_some(&client.state.output)
    }
}
