//! A model of one Redis process: data, offsets, users, roles.
//!
//! The data is the log of everything that was ever applied, so "lost" and "diverged" are visible.
//! Invariant: two processes with the same replication id agree on the log up to the lower offset.

use std::collections::BTreeMap;

use slotmesh_agent::fence::{KnownUser, KnownUsers, password_sha256};

use crate::{
    engine,
    msg::ConnId,
    sched::{Micros, SEC},
};

/// What a command does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// SET of the key to the operation's id.
    Set,
    /// RPUSH of the operation's id.
    Push,
    /// Moves the offset: what expiry and PING do.
    Noop,
    /// REPLCONF GETACK in the stream: whoever gets it says at once how far it is.
    GetAck,
    /// A command that only newer engines know.
    Newer,
    /// Such a one in the data of an engine that did not know it: nothing.
    Refused,
}

/// A write, as the log has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Op {
    /// Unique in a run.
    pub id: u64,
    /// Which key.
    pub key: u32,
    /// What it does.
    pub kind: Kind,
}

impl Op {
    /// As it came: a replica passes its primary's stream on, whatever it made of it itself.
    #[must_use]
    pub fn passed_on(self) -> Self {
        let kind = match self.kind {
            Kind::Refused => Kind::Newer,
            kind => kind,
        };
        Self { kind, ..self }
    }
}

/// Commands on the local socket.
#[derive(Clone, Debug)]
pub enum Admin {
    /// INFO.
    Info,
    /// ACL LIST.
    Users,
    /// ACL SETUSER with full rights of its kind.
    Grant {
        user: String,
        sha: String,
        replication: bool,
    },
    /// ACL SETUSER that gives full rights back to a proxy user.
    Restore(String),
    /// ACL SETUSER that leaves reads only.
    SoftFence(String),
    /// ACL DELUSER.
    Delete(Vec<String>),
    /// CONFIG SET masteruser, masterauth.
    SetLogin { user: String, password: String },
    /// REPLICAOF.
    Follow(String),
    /// What was written since a byte of a history, as a replica would get it.
    Capture { replid: String, from: i64 },
    /// REPLICAOF NO ONE.
    Promote,
    /// FAILOVER TO … TIMEOUT.
    Failover { to: String, timeout: Micros },
    /// FAILOVER ABORT.
    Abort,
    /// CONFIG SET appendonly yes, of a process that began with a snapshot.
    Append,
}

impl Admin {
    /// For readers: without secrets.
    #[must_use]
    pub fn shown(&self) -> String {
        match self {
            Self::Grant { user, .. } => format!("ACL SETUSER {user}, full"),
            Self::SetLogin { user, .. } => format!("CONFIG SET masteruser {user}"),
            other => format!("{other:?}"),
        }
    }
}

/// Answers on the local socket.
#[derive(Clone, Debug)]
pub enum Answer {
    /// OK.
    Ok,
    /// Refused.
    Err(&'static str),
    /// INFO, as text.
    Info(String),
    /// ACL LIST, read.
    Users(KnownUsers),
    /// What was captured.
    Captured(Vec<Op>),
}

/// A replica asks for the stream.
#[derive(Clone, Debug)]
pub struct Psync {
    /// Login.
    pub user: String,
    /// Login.
    pub password: String,
    /// As which it announces itself.
    pub address: String,
    /// What it has.
    pub replid: u64,
    /// Up to where.
    pub offset: i64,
    /// `PSYNC … FAILOVER`: be promoted first.
    pub failover: bool,
}

/// The primary's answer.
#[derive(Clone, Debug)]
pub enum PsyncAnswer {
    /// Login refused.
    WrongPass,
    /// Refused for another reason.
    Err(&'static str),
    /// From here on.
    Continue { replid: u64 },
    /// All of it.
    Full {
        replid: u64,
        offset: i64,
        log: Vec<Op>,
        /// Version of the files of who sends it.
        format: u32,
    },
}

/// Rights of a user.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rights {
    /// All that a proxy may do.
    Full,
    /// Reads only.
    Fenced,
    /// PSYNC, REPLCONF, PING.
    Replication,
}

/// A user.
#[derive(Clone, Debug)]
pub struct User {
    /// Of its password; empty: cannot log in.
    pub sha: String,
    /// What it may do.
    pub rights: Rights,
}

/// State of a replica's link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LinkState {
    /// Tries again at the next cron.
    Down,
    /// Asked; no answer yet.
    Asked,
    /// Full synchronisation is being loaded.
    Loading,
    /// Streaming.
    Up,
}

/// A replica, as its primary sees it.
#[derive(Clone, Debug)]
pub struct Follower {
    /// As it announced itself.
    pub address: String,
    /// As whom it logged in.
    pub user: String,
    /// Acknowledged.
    pub ack: i64,
    /// Streaming.
    pub online: bool,
    /// When it acknowledged last.
    pub heard: Micros,
}

/// One connection.
#[derive(Clone, Debug, Default)]
pub struct Client {
    /// As whom it is logged in.
    pub user: String,
    /// Received and not executed.
    pub input: Vec<u8>,
    /// Commands since MULTI.
    pub multi: Option<Vec<Op>>,
    /// One of them was refused.
    pub dirty: bool,
    /// Offset after its last write.
    pub wrote: i64,
    /// WAIT: for how many replicas, and until when.
    pub waits: Option<(usize, Micros)>,
}

/// FAILOVER under way.
#[derive(Clone, Debug)]
pub struct Failover {
    /// To whom.
    pub to: String,
    /// Limit of waiting.
    pub until: Micros,
    /// Past waiting: demoted, asking the target to take over.
    pub in_progress: bool,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Process {
    /// New with each start.
    pub run_id: String,
    /// What it is a process of, as its assignment named it.
    pub engine: String,
    /// Its own address.
    pub address: String,
    /// `None`: a primary. Otherwise whom it follows.
    pub following: Option<String>,
    /// Of a replica.
    pub link: LinkState,
    /// The connection to its primary.
    pub link_conn: Option<ConnId>,
    /// When its primary was heard last.
    pub link_heard: Micros,
    /// With which it logs in there.
    pub login: (String, String),
    /// Who may do what.
    pub users: BTreeMap<String, User>,
    /// Its history's name.
    pub replid: u64,
    /// The name before its promotion.
    pub replid2: u64,
    /// Up to where `replid2` is valid.
    pub second_offset: i64,
    /// Everything applied.
    pub log: Vec<Op>,
    /// Offset minus length of the log.
    pub shift: i64,
    /// Lowest offset that can be streamed from.
    pub backlog_from: i64,
    /// Lengths of lists by key.
    pub lengths: BTreeMap<u32, u64>,
    /// Last SET by key.
    pub last: BTreeMap<u32, u64>,
    /// Connections of clients, proxies and replicas.
    pub clients: BTreeMap<ConnId, Client>,
    /// Replicas.
    pub followers: BTreeMap<ConnId, Follower>,
    /// FAILOVER under way.
    pub failover: Option<Failover>,
    /// Loads until then.
    pub loading_until: Micros,
    /// Full synchronisations served.
    pub sync_full: u64,
    /// So much of the log was on its disk when it began.
    pub loaded: usize,
    /// It has been a primary.
    pub led: bool,
    /// Commands of its primary that it has refused since it began.
    pub refused: u64,
}

impl Process {
    /// A process that was just started with these data: born fenced, following nobody.
    #[must_use]
    pub fn start(run_id: String, replid: u64, address: String, log: Vec<Op>) -> Self {
        let mut process = Self {
            run_id,
            engine: String::new(),
            address,
            following: None,
            link: LinkState::Down,
            link_conn: None,
            link_heard: 0,
            login: (String::new(), String::new()),
            users: BTreeMap::new(),
            replid,
            replid2: 0,
            second_offset: -1,
            shift: -(log.len() as i64),
            backlog_from: 0,
            log: Vec::new(),
            lengths: BTreeMap::new(),
            last: BTreeMap::new(),
            clients: BTreeMap::new(),
            followers: BTreeMap::new(),
            failover: None,
            loading_until: 0,
            sync_full: 0,
            loaded: log.len(),
            led: false,
            refused: 0,
        };
        for op in log {
            process.apply(op);
        }
        process
    }

    /// It was started with a snapshot of its predecessor, as a replica of nobody: it can go on where
    /// that one stopped.
    pub fn resume(&mut self, replid: u64, offset: i64) {
        self.replid = replid;
        self.shift = offset - self.log.len() as i64;
        self.backlog_from = offset;
        self.following = Some(slotmesh_agent::node::NOWHERE.to_owned());
    }

    /// Replication offset.
    #[must_use]
    pub fn offset(&self) -> i64 {
        self.log.len() as i64 + self.shift
    }

    /// True for a primary.
    #[must_use]
    pub fn is_primary(&self) -> bool {
        self.following.is_none()
    }

    /// Applies one operation.
    pub fn apply(&mut self, op: Op) {
        match op.kind {
            Kind::Set => {
                self.last.insert(op.key, op.id);
            }
            Kind::Push => *self.lengths.entry(op.key).or_default() += 1,
            Kind::Noop | Kind::GetAck | Kind::Newer | Kind::Refused => {}
        }
        self.log.push(op);
    }

    /// What it has written as a primary and a successor's data do not have.
    #[must_use]
    pub fn beyond(&self, log: &[Op]) -> Vec<Op> {
        if !self.led {
            return Vec::new();
        }
        let known: std::collections::BTreeSet<u64> = log.iter().map(|op| op.id).collect();
        let own = self.log.iter().skip(self.loaded);
        let writes = own.filter(|op| matches!(op.kind, Kind::Set | Kind::Push));
        writes
            .filter(|op| !known.contains(&op.id))
            .copied()
            .collect()
    }

    /// How many replicas have everything up to an offset.
    #[must_use]
    pub fn acknowledged(&self, offset: i64) -> usize {
        let has = |f: &&Follower| f.online && f.ack >= offset;
        self.followers.values().filter(has).count()
    }

    /// Operations after an offset.
    #[must_use]
    pub fn since(&self, offset: i64) -> Vec<Op> {
        let from = usize::try_from(offset - self.shift).unwrap_or(0);
        let ops = self.log.get(from..).unwrap_or_default().iter();
        ops.map(|op| op.passed_on()).collect()
    }

    /// Replaces the data.
    pub fn load(&mut self, replid: u64, offset: i64, log: Vec<Op>) {
        self.lengths.clear();
        self.last.clear();
        self.log.clear();
        self.shift = offset - log.len() as i64;
        self.backlog_from = offset;
        self.replid = replid;
        self.replid2 = 0;
        self.second_offset = -1;
        for op in log {
            self.apply(op);
        }
    }

    /// Becomes a primary with a history of its own.
    pub fn unset_master(&mut self, replid: u64) {
        self.following = None;
        self.link = LinkState::Down;
        self.replid2 = self.replid;
        self.second_offset = self.offset();
        self.replid = replid;
    }

    /// Whether it can go on from what a replica has.
    #[must_use]
    pub fn can_continue(&self, replid: u64, offset: i64) -> bool {
        let same =
            replid == self.replid || (replid == self.replid2 && offset <= self.second_offset);
        same && offset >= self.backlog_from && offset <= self.offset()
    }

    /// True if this login is right and of this kind.
    #[must_use]
    pub fn admits(&self, user: &str, password: &str, replication: bool) -> bool {
        self.users.get(user).is_some_and(|u| {
            (u.rights == Rights::Replication) == replication && u.sha == password_sha256(password)
        })
    }

    /// Whether a proxy could write now, and as whom.
    #[must_use]
    pub fn writable_as(&self) -> Option<&str> {
        if !self.is_primary() || self.failover.is_some() {
            return None;
        }
        let full = |(_, u): &(&String, &User)| u.rights == Rights::Full && !u.sha.is_empty();
        self.users
            .iter()
            .filter(full)
            .map(|(name, _)| name.as_str())
            .next_back()
    }

    /// ACL LIST, as the agent reads it.
    #[must_use]
    pub fn known_users(&self) -> KnownUsers {
        let known = |u: &User| KnownUser {
            password_sha256: u.sha.clone(),
            full: u.rights == Rights::Full,
            current: true,
        };
        self.users
            .iter()
            .map(|(name, u)| (name.clone(), known(u)))
            .collect()
    }

    /// INFO, as the engine writes it.
    #[must_use]
    pub fn info(&self, now: Micros) -> String {
        use std::fmt::Write as _;
        let version = engine::version(&self.engine);
        let mut text = format!(
            "redis_version:{version}\r\nrun_id:{}\r\nunexpected_error_replies:{}\r\n",
            self.run_id, self.refused
        );
        let loading = u8::from(self.loading_until > now);
        let role = if self.is_primary() { "master" } else { "slave" };
        let state = match &self.failover {
            None => "no-failover",
            Some(f) if f.in_progress => "failover-in-progress",
            Some(_) => "waiting-for-sync",
        };
        let _ = write!(
            text,
            "loading:{loading}\r\nrole:{role}\r\nmaster_failover_state:{state}\r\n"
        );
        if let Some((host, port)) = self.following.as_ref().and_then(|a| a.rsplit_once(':')) {
            let up = if self.link == LinkState::Up && loading == 0 {
                "up"
            } else {
                "down"
            };
            let syncing = u8::from(self.link == LinkState::Loading || loading == 1);
            let _ = write!(
                text,
                "master_host:{host}\r\nmaster_port:{port}\r\nmaster_link_status:{up}\r\n\
                 master_sync_in_progress:{syncing}\r\nslave_repl_offset:{}\r\n",
                self.offset()
            );
            let silent = match up {
                "up" => i64::try_from(now.saturating_sub(self.link_heard) / SEC).unwrap_or(0),
                _ => -1,
            };
            let _ = write!(text, "master_last_io_seconds_ago:{silent}\r\n");
        }
        for (n, follower) in self.followers.values().enumerate() {
            let Some((ip, port)) = follower.address.rsplit_once(':') else {
                continue;
            };
            let state = if follower.online {
                "online"
            } else {
                "wait_bgsave"
            };
            let _ = write!(
                text,
                "slave{n}:ip={ip},port={port},state={state},offset={},lag={}\r\n",
                follower.ack,
                now.saturating_sub(follower.heard) / SEC
            );
        }
        let _ = write!(
            text,
            "master_replid:{}\r\nmaster_repl_offset:{}\r\nsync_full:{}\r\n\
             master_replid2:{}\r\nsecond_repl_offset:{}\r\n",
            self.replid,
            self.offset(),
            self.sync_full,
            self.replid2,
            if self.replid2 == 0 {
                -1
            } else {
                // The first byte that is not of the old history, as the engine counts.
                self.second_offset + 1
            }
        );
        let keys = self.lengths.len() + self.last.len();
        if keys > 0 {
            let _ = write!(text, "db0:keys={keys},expires=0,avg_ttl=0\r\n");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(id: u64) -> Op {
        Op {
            id,
            key: 1,
            kind: Kind::Push,
        }
    }

    fn process(replid: u64, ops: u64) -> Process {
        Process::start("r".into(), replid, "n:1".into(), (0..ops).map(op).collect())
    }

    #[test]
    fn a_promoted_replica_continues_its_old_history_up_to_its_promotion() {
        let mut n = process(7, 0);
        (0..5).for_each(|i| n.apply(op(i)));
        n.unset_master(8);
        assert!(n.can_continue(7, 5) && n.can_continue(7, 3));
        n.apply(op(5));
        assert!(
            !n.can_continue(7, 6),
            "bytes that the old history went on with"
        );
        assert!(n.can_continue(8, 6));
    }

    #[test]
    fn a_restarted_process_is_fenced_and_has_another_history() {
        let n = process(9, 3);
        assert_eq!((n.offset(), n.log.len(), n.writable_as()), (0, 3, None));
        assert!(!n.can_continue(7, 0));
    }
}
