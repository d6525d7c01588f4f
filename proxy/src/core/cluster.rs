//! CLUSTER as a cluster would answer whose nodes are all this proxy.
//!
//! Invariant: no address of a node is named. A cluster-aware client finds the slots of each shard at
//! the address that it came by (or the one that operators told to advertise), and sends everything
//! there.

use std::fmt::Write as _;

use slotmesh_command::Command;
use slotmesh_resp::{Value, parse_i64, write};
use slotmesh_topology::{SLOT_COUNT, Slot};

use super::Core;
use super::dispatch::Flow;
use super::job::{Answers, Job, Round, Step};
use super::retry::Effect;
use super::spec::Request;

const BAD_SLOT: &[u8] = b"ERR Invalid or out of range slot";
const NOT_AN_INTEGER: &[u8] = b"ERR value is not an integer or out of range";
/// Where a node's cluster bus would be; there is none, but clients parse it.
const BUS_OFFSET: u32 = 10_000;

/// What is shown of a shard.
struct ShownNode {
    id: String,
    mine: bool,
    /// Both ends included.
    ranges: Vec<(u16, u16)>,
}

impl Core {
    pub(super) fn cluster_command(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Flow {
        if !self.table.settings.parameters.cluster_compat {
            return self.reply_error(slot, b"ERR This instance has cluster support disabled");
        }
        match command.name {
            "cluster|slots" => self.cluster_slots(slot),
            "cluster|shards" => self.cluster_shards(slot),
            "cluster|nodes" => self.cluster_nodes(slot),
            "cluster|info" => self.cluster_info(slot),
            "cluster|myid" | "cluster|myshardid" => {
                let id = self.node_id();
                self.reply_with(slot, |out| write::write_bulk(out, id.as_bytes()))
            }
            "cluster|keyslot" => {
                let number = i64::from(Slot::of(request.arg(2)).number());
                self.reply_with(slot, |out| write::write_int(out, number))
            }
            "cluster|countkeysinslot" => self.keys_in_slot(slot, request.arg(2), None),
            "cluster|getkeysinslot" => {
                let count = parse_i64(request.arg(3)).and_then(|n| usize::try_from(n).ok());
                match count {
                    Some(count) => self.keys_in_slot(slot, request.arg(2), Some(count)),
                    None => self.reply_error(slot, b"ERR Invalid number of keys"),
                }
            }
            "cluster|slaves" | "cluster|replicas" | "cluster|links" => {
                self.reply_with(slot, |out| write::write_array_header(out, 0))
            }
            "cluster|count-failure-reports" => {
                self.reply_with(slot, |out| write::write_int(out, 0))
            }
            _ => {
                let text = b"ERR slotmesh: slots and nodes are managed by the controller";
                self.refuse(slot, text)
            }
        }
    }

    /// Forty hex digits, as clients expect of a node's id.
    fn node_id(&self) -> String {
        format!("{:0>40.40}", self.identity.run_id)
    }

    /// Host and port by which the asking client can reach this proxy again.
    fn own_endpoint(&self, slot: u32) -> (String, u16) {
        let advertised = self.identity.advertise.as_deref();
        if let Some((host, port)) = advertised.and_then(|a| a.rsplit_once(':'))
            && let Ok(port) = port.parse()
        {
            return (host.to_owned(), port);
        }
        let local = self.sessions.get(slot).and_then(|client| client.local);
        match local {
            Some(local) => (local.ip().to_string(), local.port()),
            None => (String::new(), self.identity.port),
        }
    }

    /// A node for each shard, all at this proxy's address: some clients refuse a cluster of one node.
    fn shown_nodes(&self) -> Vec<ShownNode> {
        let id = self.node_id();
        let shards = self.table.slot_ranges();
        let shown = shards.into_iter().enumerate().map(|(index, ranges)| {
            let mine = index == 0;
            let id = if mine {
                id.clone()
            } else {
                format!("{}{index:04x}", &id[..36])
            };
            ShownNode { id, mine, ranges }
        });
        shown.collect()
    }

    fn cluster_slots(&mut self, slot: u32) -> Flow {
        let ((host, port), nodes) = (self.own_endpoint(slot), self.shown_nodes());
        let protocol = self.protocol(slot);
        self.reply_with(slot, |out| {
            write::write_array_header(out, nodes.iter().map(|node| node.ranges.len()).sum());
            for node in &nodes {
                for (first, last) in &node.ranges {
                    write::write_array_header(out, 3);
                    write::write_int(out, i64::from(*first));
                    write::write_int(out, i64::from(*last));
                    write::write_array_header(out, 4);
                    write::write_bulk(out, host.as_bytes());
                    write::write_int(out, i64::from(port));
                    write::write_bulk(out, node.id.as_bytes());
                    write::write_map_header(out, protocol, 0);
                }
            }
        })
    }

    fn cluster_shards(&mut self, slot: u32) -> Flow {
        let ((host, port), nodes) = (self.own_endpoint(slot), self.shown_nodes());
        let protocol = self.protocol(slot);
        self.reply_with(slot, |out| {
            let text = |out: &mut Vec<u8>, key: &str, value: &str| {
                write::write_bulk(out, key.as_bytes());
                write::write_bulk(out, value.as_bytes());
            };
            write::write_array_header(out, nodes.len());
            for node in &nodes {
                write::write_map_header(out, protocol, 2);
                write::write_bulk(out, b"slots");
                write::write_array_header(out, node.ranges.len() * 2);
                for (first, last) in &node.ranges {
                    write::write_int(out, i64::from(*first));
                    write::write_int(out, i64::from(*last));
                }
                write::write_bulk(out, b"nodes");
                write::write_array_header(out, 1);
                write::write_map_header(out, protocol, 7);
                text(out, "id", &node.id);
                write::write_bulk(out, b"port");
                write::write_int(out, i64::from(port));
                text(out, "ip", &host);
                text(out, "endpoint", &host);
                text(out, "role", "master");
                write::write_bulk(out, b"replication-offset");
                write::write_int(out, 0);
                text(out, "health", "online");
            }
        })
    }

    fn cluster_nodes(&mut self, slot: u32) -> Flow {
        let ((host, port), nodes) = (self.own_endpoint(slot), self.shown_nodes());
        let protocol = self.protocol(slot);
        let bus = u32::from(port) + BUS_OFFSET;
        let mut text = String::new();
        for (index, node) in nodes.iter().enumerate() {
            let (id, epoch) = (&node.id, index + 1);
            let flags = if node.mine { "myself,master" } else { "master" };
            let _ = write!(
                text,
                "{id} {host}:{port}@{bus} {flags} - 0 0 {epoch} connected"
            );
            for (first, last) in &node.ranges {
                let _ = write!(text, " {first}-{last}");
            }
            text.push('\n');
        }
        self.reply_with(slot, |out| {
            write::write_verbatim(out, protocol, *b"txt", text.as_bytes());
        })
    }

    fn cluster_info(&mut self, slot: u32) -> Flow {
        let state = if self.table.is_complete() {
            "ok"
        } else {
            "fail"
        };
        let protocol = self.protocol(slot);
        let nodes = self.table.slot_ranges().len();
        let text = format!(
            "cluster_state:{state}\r\ncluster_slots_assigned:{SLOT_COUNT}\r\n\
             cluster_slots_ok:{SLOT_COUNT}\r\ncluster_slots_pfail:0\r\ncluster_slots_fail:0\r\n\
             cluster_known_nodes:{nodes}\r\ncluster_size:{nodes}\r\ncluster_current_epoch:1\r\n\
             cluster_my_epoch:1\r\ncluster_stats_messages_sent:0\r\n\
             cluster_stats_messages_received:0\r\ntotal_cluster_links_buffer_limit_exceeded:0\r\n"
        );
        self.reply_with(slot, |out| {
            write::write_verbatim(out, protocol, *b"txt", text.as_bytes());
        })
    }

    /// Walks the shard that owns a slot: nodes keep no index by slot.
    fn keys_in_slot(&mut self, slot: u32, number: &[u8], want: Option<usize>) -> Flow {
        let Some(number) = parse_i64(number) else {
            return self.reply_error(slot, NOT_AN_INTEGER);
        };
        let valid = u16::try_from(number).ok().filter(|n| *n < SLOT_COUNT);
        let Some(wanted) = valid else {
            return self.reply_error(slot, BAD_SLOT);
        };
        let job = KeysInSlot {
            wanted,
            limit: want,
            cursor: b"0".to_vec(),
            begun: false,
            found: Vec::new(),
            count: 0,
        };
        self.start_job(slot, Box::new(job))
    }
}

/// CLUSTER COUNTKEYSINSLOT and GETKEYSINSLOT: SCAN of the owner, in the client's database.
#[derive(Debug)]
struct KeysInSlot {
    wanted: u16,
    /// Names are wanted, at most so many; else only their number.
    limit: Option<usize>,
    cursor: Vec<u8>,
    begun: bool,
    found: Vec<Vec<u8>>,
    count: i64,
}

/// Keys of one step: a node is busy with it for about a millisecond.
const SCAN_COUNT: &[u8] = b"1000";

impl Job for KeysInSlot {
    fn next(&mut self, answers: Answers, round: &mut Round<'_>) -> Step {
        if self.begun {
            let answer = answers.first().map_or(&[][..], Vec::as_slice);
            let decoded = Value::decode(answer);
            let parts = match &decoded {
                Ok(Some((Value::Array(parts), _))) if parts.len() == 2 => parts,
                _ => return round.pass(answer),
            };
            self.take(parts[1].as_items().unwrap_or_default());
            self.cursor = parts[0].as_bytes().unwrap_or(b"0").to_vec();
            let full = self.limit.is_some_and(|limit| self.found.len() >= limit);
            if full || self.cursor == b"0" {
                return self.finish(round);
            }
        }
        self.begun = true;
        let owner = round.table.shard_of_slot(self.wanted);
        let scan: &[&[u8]] = &[b"SCAN", &self.cursor, b"COUNT", SCAN_COUNT];
        round.ask(owner, Effect::Read, scan);
        Step::Asked
    }
}

impl KeysInSlot {
    fn take(&mut self, keys: &[Value]) {
        let wanted = self.wanted;
        let keys = keys.iter().filter_map(Value::as_bytes);
        for key in keys.filter(|key| Slot::of(key).number() == wanted) {
            self.count += 1;
            if self.limit.is_some_and(|limit| self.found.len() < limit) {
                self.found.push(key.to_vec());
            }
        }
    }

    fn finish(&mut self, round: &mut Round<'_>) -> Step {
        let (count, found) = (self.count, std::mem::take(&mut self.found));
        let names = self.limit.is_some();
        round.done(|out, _| {
            if !names {
                return write::write_int(out, count);
            }
            write::write_array_header(out, found.len());
            found.iter().for_each(|key| write::write_bulk(out, key));
        })
    }
}
