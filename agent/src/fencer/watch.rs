//! What the fencer guards, and when it kills.
//!
//! Invariant: before a right's end nothing is killed. After it, a primary whose followers have all
//! acknowledged something just now is left alone; one that misses a follower is killed at the second
//! look, so that no single look decides; one that does not answer serves nobody, and is killed when
//! that lasts.
//!
//! The time that this takes is a promise to those who choose another primary: `FRESH`, and two
//! looks after it, from the last acknowledgment on. They wait longer than that.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use rustix::process::Signal;
use tokio::{task::JoinSet, time::timeout};

use super::client::{Pet, Watched};
use crate::{
    control::Control, fence::ADMIN_USER, lease::Boot, node::files::NodeDir, probe::Info,
    process::Process,
};

/// For one look; a node that is well answers in a millisecond.
const ANSWER_WITHIN: Duration = Duration::from_millis(100);
/// How long a node may be without an answer: its main thread is busy, so it takes no writes either.
const SILENT_MAX: Duration = Duration::from_secs(1);
/// Looks in a row that miss a follower.
const MISSING_LOOKS: u32 = 2;
/// How old a replica's last acknowledgment may be. Replicas acknowledge each second, and as their
/// primary pings them each second there is always something new to acknowledge. The engine's own count
/// is of whole seconds, which would make a second of 2.
const FRESH: Duration = Duration::from_millis(1_500);
/// Looked at so long before the end of its right: it takes as long to know when a follower was heard.
/// An agent that is well moves the end away before that.
const LOOK_AHEAD: Duration = Duration::from_millis(1_600);

/// All that is guarded, by the node's directory.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    nodes: BTreeMap<PathBuf, Guarded>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Guarded {
    followers: usize,
    until: Boot,
    missing: u32,
    silent_since: Option<Boot>,
    /// By address: what a follower acknowledged last, and when that was new.
    heard: BTreeMap<String, Heard>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Heard {
    offset: u64,
    lag_s: u64,
    at: Boot,
}

/// What one look shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Look {
    /// It takes no writes.
    Replica,
    /// The online ones of its followers.
    Primary(Vec<Follower>),
    Silent,
}

/// As the primary's engine tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Follower {
    address: String,
    offset: u64,
    lag_s: u64,
}

impl Watch {
    pub(crate) fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    pub(crate) fn petted(&mut self, pet: Pet) {
        let mut nodes: BTreeMap<PathBuf, Guarded> = BTreeMap::new();
        for dir in pet.keep {
            nodes.extend(self.nodes.remove_entry(&dir));
        }
        nodes.extend(pet.nodes.into_iter().map(guarded));
        self.nodes = nodes;
    }

    pub(crate) fn is_due(&self, now: Boot) -> bool {
        self.nodes.values().any(|node| node.is_watched(now))
    }

    /// A node whose process has ended needs no guard: whatever starts it again does so fenced.
    pub(crate) fn forget_the_ended(&mut self) {
        self.nodes.retain(|dir, _| process_in(dir).is_some());
    }

    /// Looks at those whose right has run out, or is about to; kills those that must not go on.
    pub(crate) async fn look(&mut self, now: Boot) {
        let mut looks = JoinSet::new();
        for (dir, _) in self.nodes.iter().filter(|(_, node)| node.is_watched(now)) {
            let dir = dir.clone();
            looks.spawn(async move {
                let look = timeout(ANSWER_WITHIN, look_at(&dir)).await;
                (dir, look.unwrap_or(Look::Silent))
            });
        }
        for (dir, look) in looks.join_all().await {
            let Some(node) = self.nodes.get_mut(&dir) else {
                continue;
            };
            if node.is_over(&look, Boot::now())
                && let Some(process) = process_in(&dir)
            {
                tracing::error!(
                    node = %dir.display(), pid = process.pid, ?look,
                    "no agent has a right to serve for this node, and it is not followed: killed"
                );
                process.signal(Signal::KILL);
            }
        }
    }
}

impl Guarded {
    fn is_watched(&self, now: Boot) -> bool {
        now.plus(LOOK_AHEAD) >= self.until
    }

    /// Counts a look; `true`: enough of them, and its right is over.
    fn is_over(&mut self, look: &Look, now: Boot) -> bool {
        match look {
            Look::Replica => {
                (self.missing, self.silent_since) = (0, None);
                return false;
            }
            Look::Primary(followers) => {
                self.silent_since = None;
                self.hear(followers, now);
            }
            Look::Silent => {
                self.silent_since.get_or_insert(now);
            }
        }
        if now < self.until {
            return false;
        }
        let fresh = self.heard.values().filter(|h| now <= h.at.plus(FRESH));
        self.missing = match fresh.count() >= self.followers {
            true => 0,
            false => self.missing + 1,
        };
        let is_silent = (self.silent_since).is_some_and(|since| now >= since.plus(SILENT_MAX));
        is_silent || self.missing >= MISSING_LOOKS
    }

    fn hear(&mut self, followers: &[Follower], now: Boot) {
        self.heard
            .retain(|address, _| followers.iter().any(|f| f.address == *address));
        for follower in followers {
            // Of one that was not looked at before, what the engine says has to do.
            let before = self.heard.get(&follower.address).copied();
            let at = match before {
                Some(h) if h.offset == follower.offset && h.lag_s <= follower.lag_s => h.at,
                Some(_) => now,
                None => Boot(now.0.saturating_sub(follower.lag_s.saturating_mul(1_000))),
            };
            let heard = Heard {
                offset: follower.offset,
                lag_s: follower.lag_s,
                at,
            };
            self.heard.insert(follower.address.clone(), heard);
        }
    }
}

fn guarded(watched: Watched) -> (PathBuf, Guarded) {
    let node = Guarded {
        followers: watched.followers,
        until: watched.until,
        missing: 0,
        silent_since: None,
        heard: BTreeMap::new(),
    };
    (watched.dir, node)
}

fn open(dir: &std::path::Path) -> Option<NodeDir> {
    let name = dir.file_name()?.to_str()?;
    dir.is_dir()
        .then(|| NodeDir::create(dir.parent()?, name).ok())?
}

fn process_in(dir: &std::path::Path) -> Option<Process> {
    Process::load(&open(dir)?.process_file())
}

async fn look_at(dir: &std::path::Path) -> Look {
    let ask = async {
        let dir = open(dir)?;
        let secret = dir.admin_secret().ok()?;
        let mut control = Control::unix(dir.socket(), ADMIN_USER, &secret)
            .await
            .ok()?;
        Info::read(&mut control, "replication").await.ok()
    };
    match ask.await {
        Some(info) => read(&info),
        None => Look::Silent,
    }
}

fn read(info: &Info) -> Look {
    if info.text("role") == "slave" {
        return Look::Replica;
    }
    let lines = (0u32..).map_while(|n| match info.text(&format!("slave{n}")) {
        "" => None,
        line => Some(line),
    });
    Look::Primary(lines.filter_map(online).collect())
}

/// A line of `INFO`, if its replica is online.
fn online(line: &str) -> Option<Follower> {
    let field = |name| {
        line.split(',')
            .find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
    };
    let number = |name| field(name)?.parse::<u64>().ok();
    (field("state") == Some("online")).then_some(())?;
    Some(Follower {
        address: format!("{}:{}", field("ip")?, field("port")?),
        offset: number("offset")?,
        lag_s: number("lag")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(until: Boot) -> Guarded {
        guarded(Watched {
            dir: "n".into(),
            followers: 2,
            until,
        })
        .1
    }

    fn primary(followers: &[(u64, u64)]) -> Look {
        let followers = followers.iter().enumerate();
        let follower = |(n, (offset, lag_s)): (usize, &(u64, u64))| Follower {
            address: format!("h:{n}"),
            offset: *offset,
            lag_s: *lag_s,
        };
        Look::Primary(followers.map(follower).collect())
    }

    #[test]
    fn online_followers_are_read_with_what_they_acknowledged() {
        let text = "role:master\r\n\
            slave0:ip=127.0.0.1,port=7,state=online,offset=9,lag=1\r\n\
            slave1:ip=127.0.0.1,port=8,state=wait_bgsave,offset=0,lag=0\r\n";
        let follower = Follower {
            address: "127.0.0.1:7".into(),
            offset: 9,
            lag_s: 1,
        };
        assert_eq!(read(&Info::parse(text)), Look::Primary(vec![follower]));
        assert_eq!(read(&Info::parse("role:slave\r\n")), Look::Replica);
    }

    #[test]
    fn followers_that_go_on_acknowledging_keep_a_primary_without_right_alive() {
        let mut node = node(Boot(0));
        for second in 0..60 {
            for at in (0..1_000).step_by(50) {
                let now = Boot(100_000 + second * 1_000 + at);
                let look = primary(&[(second, 0), (second * 14, u64::from(at > 500))]);
                assert!(!node.is_over(&look, now), "{now:?}");
            }
        }
    }

    #[test]
    fn a_primary_is_killed_so_long_after_the_last_acknowledgment_and_two_looks() {
        let mut node = node(Boot(100_000));
        let mut killed = None;
        // One of the two was heard for the last time at 101,000.
        for at in (98_400..110_000).step_by(50) {
            let lost = 7.max(at.min(101_000) / 1_000);
            let lag_s = (at.max(101_000) - 101_000) / 1_000;
            if node.is_over(&primary(&[(at / 1_000, 0), (lost, lag_s)]), Boot(at)) {
                killed = Some(at);
                break;
            }
        }
        let last = 101_000 + u64::try_from(FRESH.as_millis()).unwrap();
        assert_eq!(killed, Some(last + 100));
    }

    #[test]
    fn one_look_that_misses_a_follower_kills_nothing_and_none_before_the_end_of_the_right() {
        let mut node = node(Boot(100_000));
        assert!(node.is_watched(Boot(98_400)) && !node.is_watched(Boot(98_399)));
        for at in (98_400..100_000).step_by(50) {
            assert!(!node.is_over(&primary(&[]), Boot(at)));
        }
        assert!(!node.is_over(&primary(&[(1, 0)]), Boot(100_000)));
        assert!(!node.is_over(&primary(&[(1, 0), (1, 0)]), Boot(100_050)));
        assert!(!node.is_over(&primary(&[(1, 0)]), Boot(100_100)));
        assert!(node.is_over(&primary(&[(1, 0)]), Boot(100_150)));
    }

    #[test]
    fn silence_is_borne_for_a_second_and_no_longer_than_a_follower_is() {
        let both = primary(&[(9, 0), (9, 0)]);
        let mut node = node(Boot(0));
        assert!(!node.is_over(&both, Boot(0)));
        assert!(!node.is_over(&Look::Silent, Boot(100)));
        assert!(!node.is_over(&Look::Silent, Boot(1_099)));
        assert!(node.is_over(&Look::Silent, Boot(1_100)));
        let mut node = guarded(Watched {
            dir: "n".into(),
            followers: 2,
            until: Boot(0),
        })
        .1;
        assert!(!node.is_over(&both, Boot(0)));
        assert!(!node.is_over(&both, Boot(1_400)));
        assert!(!node.is_over(&Look::Silent, Boot(1_550)));
        assert!(node.is_over(&Look::Silent, Boot(1_600)));
    }

    #[test]
    fn what_an_agent_has_no_right_for_yet_stays_guarded_as_it_was() {
        let watched = |name: &str, until| Watched {
            dir: name.into(),
            followers: 1,
            until: Boot(until),
        };
        let mut watch = Watch::default();
        watch.petted(Pet {
            nodes: vec![watched("a", 5), watched("b", 5)],
            keep: vec![],
        });
        watch.petted(Pet {
            nodes: vec![watched("c", 9)],
            keep: vec!["a".into()],
        });
        let names: Vec<_> = watch.nodes.keys().cloned().collect();
        assert_eq!(names, [PathBuf::from("a"), PathBuf::from("c")]);
        assert!(watch.is_due(Boot(5)));
    }
}
