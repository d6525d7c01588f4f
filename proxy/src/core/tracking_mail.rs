//! CLIENT TRACKING … REDIRECT of a client with a lane of its own: the node sends the notices by a
//! connection beside the lane, the client's *mail*, because one of RESP2 has no room for them.
//!
//! Invariant: the mail goes to the node of the lane, and the lane's node uses it only as long as it
//! stands. While there is none, notices are missed; so the client that is told hears that everything
//! may have changed when it is lost, and again once the node uses the next one.

use slotmesh_resp::{Protocol, parse_i64, write};

use super::Core;
use super::client::Client;
use super::line::{LineEvent, LineNo, Opening, Use};
use super::tracking_options::Mode;
use super::tracking_own::frames;
use super::tracking_table::ClientNo;

/// Between attempts to open it again.
const RETRY_US: u64 = 50_000;

/// See the module.
#[derive(Debug)]
pub(super) struct Mail {
    pub(super) line: LineNo,
    /// What the node calls it, once it has said so.
    pub(super) id: Option<i64>,
}

impl Core {
    /// Opens the mail of a client. The node is told to use it once its name is known.
    pub(super) fn open_mail(&mut self, slot: u32) {
        let Some(client) = self.sessions.get(slot) else {
            return;
        };
        let generation = client.generation;
        let Some(lane) = client.own_tracking().map(|own| own.lane) else {
            return;
        };
        let shard = self.lanes[lane as usize].shard();
        let Some(route) = self.table.shards.get(usize::from(shard)).cloned().flatten() else {
            return;
        };
        let line = self.open_line(Opening {
            user: Use::Mail {
                client: slot,
                generation,
            },
            shard,
            epoch: route.epoch,
            address: route.address,
            login: route.login(),
            protocol: Protocol::Resp3,
        });
        self.write_line(line, |out| write::encode_command(out, &[b"CLIENT", b"ID"]));
        let own = self
            .sessions
            .get_mut(slot)
            .and_then(Client::own_tracking_mut);
        if let Some(own) = own {
            own.mail = Some(Mail { line, id: None });
        }
    }

    /// What the connection beside a client's lane has to say.
    pub(super) fn mail_event(&mut self, no: LineNo, client: ClientNo, event: LineEvent<'_>) {
        let Some(owner) = self.sessions.get_same(client.0, client.1) else {
            return self.close_line(no);
        };
        match event {
            LineEvent::Ready => {}
            LineEvent::Reply(reply) if reply.first() == Some(&b':') => {
                let id = parse_i64(reply[1..].trim_ascii_end());
                if let Some(own) = owner.own_tracking_mut()
                    && let Some(mail) = &mut own.mail
                {
                    mail.id = id;
                }
                self.mail_found(client.0);
            }
            LineEvent::Reply(reply) if reply.first() == Some(&b'>') => {
                let target = owner.redirection();
                let keys = reply.strip_prefix(b">2\r\n$10\r\ninvalidate\r\n");
                if let (Some(keys), true) = (keys, target > 0) {
                    self.tell_another(target as u64, keys);
                }
            }
            LineEvent::Reply(_) => {
                self.close_line(no);
                self.mail_lost(client);
            }
            LineEvent::Lost(_) => self.mail_lost(client),
        }
    }

    /// The node has said what it calls the mail of a client.
    fn mail_found(&mut self, slot: u32) {
        let Some(client) = self.sessions.get(slot) else {
            return;
        };
        let extra = client.extra.as_ref();
        let Some(tracking) = extra.and_then(|extra| extra.tracking.as_ref()) else {
            return;
        };
        let Some(own) = &tracking.own else { return };
        let (options, lane) = (&tracking.options, &self.lanes[own.lane as usize]);
        let id = own.mail.as_ref().and_then(|mail| mail.id);
        let setup = frames(options, &options.prefixes, id);
        let mut now = setup.clone();
        if lane.own.as_ref().is_some_and(|own| own.tracked) {
            let mut off = Vec::new();
            write::encode_command(&mut off, &[b"CLIENT", b"TRACKING", b"OFF"]);
            now.insert(0, off); // or the prefixes would overlap with themselves
        }
        let (no, out) = (own.lane, options.mode == Mode::OptOut);
        self.set_up_lane(no, now, setup, if out { b"NO" } else { b"YES" });
    }

    fn mail_lost(&mut self, client: ClientNo) {
        let owner = self.sessions.get_same(client.0, client.1);
        let Some(own) = owner.and_then(Client::own_tracking_mut) else {
            return;
        };
        own.mail = None;
        self.tell(client, None);
        let again = (client, self.now_us + RETRY_US);
        self.trackers.owns.lost.push(again);
        self.out.unsteady = true;
    }

    /// Opens mails again. Returns when the next one is due.
    pub(super) fn retry_mails(&mut self) -> Option<u64> {
        let now_us = self.now_us;
        let due = |(_, at_us): &mut (ClientNo, u64)| *at_us <= now_us;
        let due: Vec<_> = self.trackers.owns.lost.extract_if(.., due).collect();
        for ((slot, generation), _) in due {
            let owner = self.sessions.get_same(slot, generation);
            let own = owner.and_then(|owner| owner.own_tracking_mut());
            if own.is_some_and(|own| own.mail.is_none()) {
                self.open_mail(slot);
            }
        }
        self.trackers
            .owns
            .lost
            .iter()
            .map(|(_, at_us)| *at_us)
            .min()
    }
}
