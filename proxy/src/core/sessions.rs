//! The clients of a worker, and the way of a reply to its client.
//!
//! Invariants: replies leave in the order of the requests; a reply for a client that left is
//! dropped (slot and generation); an idle client owns no buffer.

use super::client::{CAPTURED, Client, ClientState, Pause};
use super::pool::Pool;
use super::stash::Stash;

/// A client's requests in flight before it is no longer read, unless a parameter says otherwise; read
/// again at half of it. Enough to keep a pipe full, small enough that one client cannot own a node's
/// queue.
pub const IN_FLIGHT_MAX: u32 = 1024;
/// Unsent bytes of a client before it is no longer read; read again at half of it.
pub const BACKLOG_PAUSE_BYTES: usize = 1024 * 1024;
/// Unsent bytes of a client at which a further reply closes it: it does not read, and what it asked
/// for already cannot be taken back. A single reply may be larger.
pub const BACKLOG_CLOSE_BYTES: usize = 256 * 1024 * 1024;
/// From this size a reply is worth a send of its own, from the buffer it was read into.
pub const DIRECT_BYTES: usize = 4 * 1024;

/// Where large replies can be sent at once, past the client's buffer.
pub trait Outlet {
    /// Sends what the socket takes now; returns how much that was.
    fn send_now(&mut self, client: u32, bytes: &[u8]) -> usize;
}

/// No direct sends: everything goes through the client's buffer.
#[derive(Debug)]
pub struct NoOutlet;

impl Outlet for NoOutlet {
    fn send_now(&mut self, _client: u32, _bytes: &[u8]) -> usize {
        0
    }
}

/// Why the proxy closes a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// It hung up, or asked to.
    Done,
    /// Its bytes were no command.
    Protocol,
    /// It did not read its replies.
    Backlog,
    /// It did not read what it subscribed to.
    Subscriber,
    /// Somebody with the right to said so.
    Killed,
    /// It said nothing for too long.
    Idle,
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    client: Option<Client>,
}

/// See the module.
#[derive(Debug)]
pub struct Sessions {
    /// The bound of a client's requests in flight.
    pub in_flight_max: u32,
    slots: Vec<Slot>,
    free: Vec<u32>,
    live: usize,
    pub pool: Pool,
    /// Boxed, because they move in and out of clients, where most have none.
    #[allow(clippy::vec_box)]
    stashes: Vec<Box<Stash>>,
    /// Clients with something to send.
    pub touched: Vec<u32>,
    /// Clients that may be read again, with their generation.
    pub resumed: Vec<(u32, u32)>,
    /// Clients that must be closed now.
    pub doomed: Vec<(u32, u32, CloseReason)>,
    /// Replies to commands that EXEC runs here, with the number that was given for them.
    pub(super) captured: Vec<(u32, Vec<u8>)>,
}

impl Default for Sessions {
    fn default() -> Self {
        Self {
            in_flight_max: IN_FLIGHT_MAX,
            slots: Vec::new(),
            free: Vec::new(),
            live: 0,
            pool: Pool::default(),
            stashes: Vec::new(),
            touched: Vec::new(),
            resumed: Vec::new(),
            doomed: Vec::new(),
            captured: Vec::new(),
        }
    }
}

impl Sessions {
    pub fn len(&self) -> usize {
        self.live
    }

    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// Takes a client in; returns its slot.
    pub fn open(&mut self, state: ClientState) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            (self.slots.len() - 1) as u32
        });
        let entry = &mut self.slots[slot as usize];
        entry.generation = (entry.generation.wrapping_add(1) & !CAPTURED).max(1);
        let unsent = !state.output.is_empty();
        entry.client = Some(Client::new(state, entry.generation));
        if unsent {
            self.touched.push(slot);
        }
        self.live += 1;
        slot
    }

    /// Lets a client go. What is in flight for it is dropped when it comes.
    pub fn close(&mut self, slot: u32) -> Option<ClientState> {
        let client = self.slots.get_mut(slot as usize)?.client.take()?;
        self.free.push(slot);
        self.live -= 1;
        if let Some(stash) = client.stash {
            self.keep_stash(stash);
        }
        let mut state = client.state;
        state.output.drain(..client.sent);
        Some(state)
    }

    #[inline]
    pub fn get(&self, slot: u32) -> Option<&Client> {
        self.slots.get(slot as usize)?.client.as_ref()
    }

    #[inline]
    pub fn get_mut(&mut self, slot: u32) -> Option<&mut Client> {
        self.slots.get_mut(slot as usize)?.client.as_mut()
    }

    #[inline]
    pub fn get_same(&mut self, slot: u32, generation: u32) -> Option<&mut Client> {
        self.get_mut(slot).filter(|c| c.generation == generation)
    }

    /// Slots of all clients.
    pub fn slots(&self) -> impl Iterator<Item = u32> {
        let taken = |(slot, one): (usize, &Slot)| one.client.is_some().then_some(slot as u32);
        self.slots.iter().enumerate().filter_map(taken)
    }

    /// Where the client of an id is.
    pub fn slot_of(&self, id: u64) -> Option<u32> {
        let is_it = |slot: &Slot| slot.client.as_ref().is_some_and(|c| c.state.id == id);
        self.slots.iter().position(is_it).map(|slot| slot as u32)
    }

    pub fn numbered(&self) -> impl Iterator<Item = (u32, &Client)> {
        let taken = self.slots.iter().enumerate();
        taken.filter_map(|(slot, one)| Some((slot as u32, one.client.as_ref()?)))
    }

    pub fn numbered_mut(&mut self) -> impl Iterator<Item = (u32, &mut Client)> {
        let taken = self.slots.iter_mut().enumerate();
        taken.filter_map(|(slot, one)| Some((slot as u32, one.client.as_mut()?)))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Client> {
        self.slots.iter().filter_map(|s| s.client.as_ref())
    }

    /// Gives a whole reply to request `seq` of a client.
    #[inline]
    pub fn deliver<O: Outlet>(
        &mut self,
        slot: u32,
        generation: u32,
        seq: u32,
        reply: &[u8],
        outlet: &mut O,
    ) {
        let Some(client) = self
            .slots
            .get_mut(slot as usize)
            .and_then(|s| s.client.as_mut())
        else {
            return;
        };
        if client.generation != generation {
            if generation & CAPTURED != 0 {
                self.captured.push((generation & !CAPTURED, reply.to_vec()));
            }
            return;
        }
        if seq != client.head {
            let distance = seq.wrapping_sub(client.head);
            let stashes = &mut self.stashes;
            client
                .stash
                .get_or_insert_with(|| stashes.pop().unwrap_or_default())
                .put(distance, reply);
            self.check_backlog(slot);
            return;
        }
        let mut rest = reply;
        if reply.len() >= DIRECT_BYTES && client.state.output.is_empty() {
            rest = &reply[outlet.send_now(slot, reply)..];
            client.sealed |= client.encrypted; // until the worker has looked, in this turn
        }
        if !rest.is_empty() {
            if client.state.output.capacity() == 0 {
                client.state.output = self.pool.take();
            }
            client.state.output.extend_from_slice(rest);
        }
        client.head = client.head.wrapping_add(1);
        if client.stash.is_some() {
            self.advance_stash(slot);
        }
        self.after_delivery(slot);
    }

    #[inline]
    fn after_delivery(&mut self, slot: u32) {
        let Some(client) = self.slots[slot as usize].client.as_mut() else {
            return;
        };
        if !client.touched {
            client.touched = true;
            self.touched.push(slot);
        }
        if client.unsent() > BACKLOG_CLOSE_BYTES {
            self.check_backlog(slot);
        } else if client.pause != Pause::None {
            self.maybe_resume(slot);
        }
    }

    fn advance_stash(&mut self, slot: u32) {
        let Some(client) = self.slots[slot as usize].client.as_mut() else {
            return;
        };
        let Some(stash) = client.stash.as_mut() else {
            return;
        };
        if client.state.output.capacity() == 0 {
            client.state.output = self.pool.take();
        }
        let due = stash.advance(&mut client.state.output);
        client.head = client.head.wrapping_add(due);
        if stash.is_empty()
            && let Some(stash) = client.stash.take()
        {
            self.keep_stash(stash);
        }
    }

    fn keep_stash(&mut self, mut stash: Box<Stash>) {
        /// As many as a busy worker uses at once; each is small.
        const KEPT_MAX: usize = 64;
        if self.stashes.len() < KEPT_MAX && stash.recycle() {
            self.stashes.push(stash);
        }
    }

    /// Closes a client whose backlog is over the bound. A single large reply is allowed.
    fn check_backlog(&mut self, slot: u32) {
        let Some(client) = self.get_mut(slot) else {
            return;
        };
        let many = client.in_flight() > 0 || client.stash.is_some();
        if client.backlog() > BACKLOG_CLOSE_BYTES && many {
            self.doom(slot, CloseReason::Backlog);
        }
    }

    /// The client has something to send.
    pub fn touch(&mut self, slot: u32) {
        if let Some(client) = self.get_mut(slot)
            && !client.touched
        {
            client.touched = true;
            self.touched.push(slot);
        }
    }

    /// Closes a client at the end of this turn, whatever it still waits for.
    pub fn doom(&mut self, slot: u32, reason: CloseReason) {
        if let Some(client) = self.get_mut(slot) {
            client.pause = Pause::Leaving;
            let generation = client.generation;
            self.doomed.push((slot, generation, reason));
        }
    }

    /// True if another command of this client may be taken; pauses it if not.
    #[inline]
    pub fn may_take(&mut self, slot: u32) -> bool {
        let in_flight_max = self.in_flight_max;
        let Some(client) = self.get_mut(slot) else {
            return false;
        };
        if client.pause != Pause::None {
            return false;
        }
        if client.in_flight() >= in_flight_max || client.backlog() > BACKLOG_PAUSE_BYTES {
            client.pause = Pause::Full;
            return false;
        }
        true
    }

    fn maybe_resume(&mut self, slot: u32) {
        let in_flight_max = self.in_flight_max;
        let Some(client) = self.get_mut(slot) else {
            return;
        };
        let small =
            client.in_flight() <= in_flight_max / 2 && client.backlog() <= BACKLOG_PAUSE_BYTES / 2;
        let resume = match client.pause {
            Pause::Full => small,
            Pause::Quiet => client.in_flight() == 0,
            Pause::None | Pause::Stalled | Pause::Blocked | Pause::Leaving | Pause::Frozen => false,
        };
        if resume {
            client.pause = Pause::None;
            let generation = client.generation;
            self.resumed.push((slot, generation));
        }
    }

    /// A client whose request had no number goes on, if nothing else of it is in flight.
    pub fn resume_quiet(&mut self, slot: u32, generation: u32) {
        if self
            .get_same(slot, generation)
            .is_some_and(|client| client.pause == Pause::Quiet)
        {
            self.maybe_resume(slot);
        }
    }

    /// Puts bytes between a client's replies: a message, an invalidation. Never within one.
    pub fn push(&mut self, slot: u32, generation: u32, bytes: &[u8]) {
        let Some(client) = self.get_same(slot, generation) else {
            return;
        };
        let empty = client.state.output.capacity() == 0;
        if empty {
            let buffer = self.pool.take();
            if let Some(client) = self.get_mut(slot) {
                client.state.output = buffer;
            }
        }
        if let Some(client) = self.get_mut(slot) {
            client.state.output.extend_from_slice(bytes);
        }
        self.after_delivery(slot);
    }

    /// The socket took `bytes` of the client's output.
    #[inline]
    pub fn mark_sent(&mut self, slot: u32, bytes: usize) {
        let Some(client) = self.slots[slot as usize].client.as_mut() else {
            return;
        };
        client.sent += bytes;
        if client.sent == client.state.output.len() {
            client.sent = 0;
            self.pool.give(std::mem::take(&mut client.state.output));
        } else if client.sent >= BACKLOG_PAUSE_BYTES && client.sent >= client.unsent() {
            // A slow reader: what it has taken must not stay in memory. Not before it is the larger
            // part, so that no byte of a long reply is moved again and again.
            client.state.output.drain(..client.sent);
            client.sent = 0;
            client.state.output.shrink_to(2 * client.state.output.len());
        }
        if client.pause == Pause::Full {
            self.maybe_resume(slot);
        }
    }

    /// Stops reading a client; it is closed once everything it asked for is answered and sent.
    pub fn leave(&mut self, slot: u32) {
        if let Some(client) = self.get_mut(slot) {
            client.pause = Pause::Leaving;
        }
    }

    /// True if a leaving client has nothing left to get.
    pub fn is_done(&self, slot: u32) -> bool {
        self.get(slot).is_some_and(|c| {
            c.pause == Pause::Leaving
                && c.in_flight() == 0
                && c.state.output.is_empty()
                && !c.sealed
        })
    }
}
