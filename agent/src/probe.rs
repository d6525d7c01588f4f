//! From `INFO` to what the agent knows of a node.
//!
//! Invariant: an absent or unreadable field is reported as its neutral value, never guessed: engines
//! of several versions answer here.

use std::collections::HashMap;

use slotmesh_proto::{agent::v1::NodeReport, store::v1::NodeRole};

use crate::{
    artifact::{self, Version},
    capture::tail::History,
    control::{Control, ControlError},
    fence::{self, KnownUsers, UserKind},
    handover::{Failover, Link, Observation, Role},
};

/// The fields of one `INFO` answer.
#[derive(Debug, Clone, Default)]
pub struct Info {
    fields: HashMap<String, String>,
}

/// A node's append-only file, in the engine's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appending {
    /// The last write to it succeeded.
    pub writes: bool,
    /// It is being written anew, or will be.
    pub rewrites: bool,
    /// The last time that this was done, it succeeded; true before there was any.
    pub rewritten: bool,
}

impl Info {
    pub fn parse(text: &str) -> Self {
        let fields = text
            .lines()
            .filter_map(|line| line.trim_end().split_once(':'))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        Self { fields }
    }

    pub async fn read(control: &mut Control, section: &str) -> Result<Self, ControlError> {
        let reply = control.call(&["INFO", section]).await?;
        Ok(Self::parse(&String::from_utf8_lossy(
            reply.as_bytes().unwrap_or_default(),
        )))
    }

    pub fn text(&self, key: &str) -> &str {
        self.fields.get(key).map_or("", String::as_str)
    }

    pub fn number(&self, key: &str) -> u64 {
        self.text(key).parse().unwrap_or(0)
    }

    pub fn run_id(&self) -> &str {
        self.text("run_id")
    }

    /// Of the engine, in its own family's counting.
    pub fn version(&self) -> Option<Version> {
        let own = match self.text("valkey_version") {
            "" => self.text("redis_version"),
            version => version,
        };
        artifact::number(own)
    }

    pub fn role(&self) -> Option<Role> {
        match self.text("role") {
            "master" => Some(Role::Primary),
            "slave" => Some(Role::Replica),
            _ => None,
        }
    }

    pub fn failover(&self) -> Failover {
        match self.text("master_failover_state") {
            "waiting-for-sync" => Failover::WaitingForSync,
            "failover-in-progress" => Failover::InProgress,
            _ => Failover::None,
        }
    }

    /// `host:port` of a replica's master.
    pub fn following(&self) -> String {
        match (self.text("master_host"), self.text("master_port")) {
            ("", _) | (_, "") => String::new(),
            (host, port) => format!("{host}:{port}"),
        }
    }

    pub fn link(&self) -> Link {
        match (
            self.text("master_link_status"),
            self.text("master_sync_in_progress"),
        ) {
            ("up", _) => Link::Up,
            (_, "1") => Link::Syncing,
            _ => Link::Down,
        }
    }

    /// The last byte that a primary has written, or a replica has executed.
    pub fn offset(&self) -> u64 {
        self.number(match self.role() {
            Some(Role::Primary) => "master_repl_offset",
            _ => "slave_repl_offset",
        })
    }

    /// The engine's own word on what it writes or follows, and went on from.
    pub fn history(&self) -> History<'_> {
        History {
            replid: self.text("master_replid"),
            offset: self.offset(),
            replid2: self.text("master_replid2"),
            second_offset: self.number("second_repl_offset"),
        }
    }

    /// A replica's last link went on from a history that it had: a full copy forgets all others.
    pub fn has_continued(&self) -> bool {
        self.text("master_replid2").bytes().any(|b| b != b'0')
    }

    /// How the append-only file does; `None`: there is none.
    pub fn appending(&self) -> Option<Appending> {
        let is = |field: &str, text: &str| self.text(field) == text;
        is("aof_enabled", "1").then(|| Appending {
            writes: is("aof_last_write_status", "ok"),
            rewrites: is("aof_rewrite_in_progress", "1") || is("aof_rewrite_scheduled", "1"),
            rewritten: is("aof_last_bgrewrite_status", "ok"),
        })
    }

    /// Online replicas of a primary: address and acknowledged offset.
    fn online_replicas(&self) -> impl Iterator<Item = (String, u64)> {
        (0u32..)
            .map_while(|n| self.fields.get(&format!("slave{n}")))
            .filter_map(|line| parse_replica(line))
    }

    /// What the hand-over wants to know; `None` when this is no answer of a node.
    pub fn observation(&self, target_address: &str) -> Option<Observation> {
        Some(Observation {
            role: self.role()?,
            link: self.link(),
            failover: self.failover(),
            follows_target: self.following() == target_address,
            target_online: self
                .online_replicas()
                .any(|(address, _)| address == target_address),
        })
    }

    /// Fills in what `INFO` tells; process, address and epochs are the caller's.
    pub fn fill(&self, report: &mut NodeReport) {
        report.run_id = self.run_id().to_owned();
        report.engine_version = match self.text("valkey_version") {
            "" => self.text("redis_version").to_owned(),
            version => format!("valkey-{version}"),
        };
        report.observed_role = match self.role() {
            Some(Role::Primary) => NodeRole::Primary.into(),
            Some(Role::Replica) => NodeRole::Replica.into(),
            None => NodeRole::Unspecified.into(),
        };
        report.replid = self.text("master_replid").to_owned();
        let primary = self.role() == Some(Role::Primary);
        report.offset = self.offset();
        report.link_up = !primary && self.link() == Link::Up;
        report.replid2 = self.text("master_replid2").to_owned();
        // Both are -1 where there is none.
        report.second_offset = self.number("second_repl_offset");
        let silent = self.number("master_last_io_seconds_ago");
        report.link_silent_s = u32::try_from(silent).unwrap_or(u32::MAX);
        report.following = if primary {
            String::new()
        } else {
            self.following()
        };
        report.loading = self.text("loading") == "1" || self.text("async_loading") == "1";
        report.busy = ["rdb_bgsave_in_progress", "aof_rewrite_in_progress"]
            .iter()
            .any(|field| self.text(field) == "1");
        (report.copied_bytes, report.copy_total_bytes) = self.copied();
        report.failover_state = self.text("master_failover_state").to_owned();
        report.used_memory = self.number("used_memory");
        report.max_memory = self.number("maxmemory");
        report.keys = self.keys();
        report.sync_full = self.number("sync_full");
        let counted = |name| self.text(name).parse().ok();
        report.sync_partial_ok = counted("sync_partial_ok");
        report.unexpected_errors = counted("unexpected_error_replies");
        report.replica_lag_bytes = self
            .online_replicas()
            .map(|(_, offset)| report.offset.saturating_sub(offset))
            .max()
            .unwrap_or(0);
    }

    /// Bytes of the data set that is being loaded: those that are there, and all. What streams in
    /// from a primary without a file in between has no known size: 0 of 0.
    fn copied(&self) -> (u64, u64) {
        let syncing = self.text("master_sync_in_progress") == "1";
        let (done, total) = if self.text("loading") == "1" || self.text("async_loading") == "1" {
            (
                self.number("loading_loaded_bytes"),
                self.number("loading_total_bytes"),
            )
        } else if syncing {
            let total = self.number("master_sync_total_bytes");
            let left = self.number("master_sync_left_bytes");
            (total.saturating_sub(left), total)
        } else {
            (0, 0)
        };
        (done.min(total), total)
    }

    /// Of `INFO commandstats`: each command's name, calls and microseconds since the start.
    pub fn costs(&self) -> impl Iterator<Item = (&str, u64, u64)> {
        self.fields.iter().filter_map(|(key, value)| {
            let name = key.strip_prefix("cmdstat_")?;
            let number = |what| field(value, what)?.parse().ok();
            Some((name, number("calls")?, number("usec")?))
        })
    }

    /// The only database that has keys; `None`: there are several, or none.
    pub fn only_database(&self) -> Option<u32> {
        let mut databases = self.fields.keys().filter_map(|key| {
            let number = key.strip_prefix("db")?;
            number.parse::<u32>().ok()
        });
        let first = databases.next()?;
        databases.next().is_none().then_some(first)
    }

    /// Over all databases.
    pub fn keys(&self) -> u64 {
        let databases = self.fields.iter().filter(|(key, _)| {
            key.strip_prefix("db")
                .is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()))
        });
        databases
            .filter_map(|(_, value)| field(value, "keys")?.parse::<u64>().ok())
            .sum()
    }
}

/// `ip=127.0.0.1,port=6380,state=online,offset=42,lag=0`
fn parse_replica(line: &str) -> Option<(String, u64)> {
    if field(line, "state")? != "online" {
        return None;
    }
    let address = format!("{}:{}", field(line, "ip")?, field(line, "port")?);
    Some((address, field(line, "offset")?.parse().ok()?))
}

fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split(',')
        .find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
}

/// The highest epoch whose proxy user has full rights; 0: none.
pub fn granted_epoch(users: &KnownUsers) -> u64 {
    users
        .iter()
        .filter(|(_, user)| user.full)
        .filter_map(|(name, _)| fence::parse_user(name))
        .filter(|(kind, _)| *kind == UserKind::Proxy)
        .map(|(_, epoch)| epoch)
        .max()
        .unwrap_or(0)
}

/// Users as which replicas may log in.
pub fn replication_users(users: &KnownUsers) -> Vec<String> {
    let kind = |name: &str| fence::parse_user(name).map(|(kind, _)| kind);
    let names = users
        .keys()
        .filter(|name| kind(name) == Some(UserKind::Replication));
    let mut names: Vec<_> = names.cloned().collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRIMARY: &str = "# Server\r\nredis_version:7.0.15\r\nrun_id:abc\r\nrole:master\r\n\
        connected_slaves:2\r\n\
        slave0:ip=127.0.0.1,port=7001,state=online,offset=90,lag=0\r\n\
        slave1:ip=127.0.0.1,port=7002,state=wait_bgsave,offset=0,lag=0\r\n\
        master_failover_state:waiting-for-sync\r\nmaster_replid:r1\r\nmaster_repl_offset:100\r\n\
        sync_full:1\r\nused_memory:5\r\n\
        db0:keys=3,expires=0,avg_ttl=0\r\ndb255:keys=4,expires=1,avg_ttl=0\r\n";

    #[test]
    fn a_primary_is_reported_with_keys_of_all_databases_and_its_worst_online_replica() {
        let mut report = NodeReport::default();
        Info::parse(PRIMARY).fill(&mut report);
        assert_eq!(report.observed_role(), NodeRole::Primary);
        assert_eq!(
            (report.keys, report.offset, report.replica_lag_bytes),
            (7, 100, 10)
        );
        assert_eq!((report.following.as_str(), report.link_up), ("", false));
    }

    #[test]
    fn only_an_online_replica_counts_as_the_target_being_online() {
        let info = Info::parse(PRIMARY);
        let seen = |target| info.observation(target).unwrap();
        assert!(seen("127.0.0.1:7001").target_online);
        assert!(!seen("127.0.0.1:7002").target_online);
        assert_eq!(seen("127.0.0.1:7001").failover, Failover::WaitingForSync);
    }

    #[test]
    fn a_replica_is_reported_with_its_link() {
        let info = Info::parse(
            "role:slave\r\nmaster_host:127.0.0.1\r\nmaster_port:7000\r\n\
             master_link_status:down\r\nmaster_sync_in_progress:1\r\nslave_repl_offset:8\r\n\
             master_repl_offset:9\r\nvalkey_version:8.0.1\r\nredis_version:7.2.4\r\n",
        );
        let mut report = NodeReport::default();
        info.fill(&mut report);
        assert_eq!(report.following, "127.0.0.1:7000");
        assert_eq!(
            (report.offset, report.engine_version.as_str()),
            (8, "valkey-8.0.1")
        );
        let seen = info.observation("127.0.0.1:7000").unwrap();
        assert!(seen.follows_target && seen.link == Link::Syncing);
    }

    #[test]
    fn what_is_loaded_is_counted_from_the_primary_or_from_files_and_never_beyond_its_size() {
        let copied = |text: &str| {
            let mut report = NodeReport::default();
            Info::parse(text).fill(&mut report);
            (report.copied_bytes, report.copy_total_bytes)
        };
        let syncing = "role:slave\r\nmaster_sync_in_progress:1\r\n";
        let sized = "master_sync_total_bytes:100\r\nmaster_sync_left_bytes:30\r\n";
        assert_eq!(copied(&format!("{syncing}{sized}")), (70, 100));
        let unsized_yet = "master_sync_total_bytes:-1\r\nmaster_sync_left_bytes:-1\r\n";
        assert_eq!(copied(&format!("{syncing}{unsized_yet}")), (0, 0));
        let loading = "loading:1\r\nloading_loaded_bytes:120\r\nloading_total_bytes:100\r\n";
        assert_eq!(copied(loading), (100, 100), "the total is an estimate");
        assert_eq!(
            copied("role:slave\r\nmaster_sync_in_progress:0\r\n"),
            (0, 0)
        );
    }

    #[test]
    fn an_answer_of_something_else_is_no_observation() {
        assert_eq!(Info::parse("loading\r\n").observation("a:1"), None);
    }
}
