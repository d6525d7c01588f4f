//! What the fencer guards, and when it kills.
//!
//! Invariant: before a right's end nothing is looked at. After it, a primary whose followers are all
//! there is left alone; one that misses a follower is killed at the second look, so that no single
//! look decides; one that does not answer serves nobody, and is killed when that lasts.

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
/// Replicas acknowledge each second; the engine counts whole seconds.
const LAG_MAX_S: u64 = 1;

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
}

/// What one look shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// Every follower is there; or it takes no writes, being a replica.
    Well,
    /// Followers are missing.
    Alone,
    Silent,
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
        self.nodes.values().any(|node| now >= node.until)
    }

    /// A node whose process has ended needs no guard: whatever starts it again does so fenced.
    pub(crate) fn forget_the_ended(&mut self) {
        self.nodes.retain(|dir, _| process_in(dir).is_some());
    }

    /// Looks at those whose right has run out; kills those that must not go on.
    pub(crate) async fn look(&mut self, now: Boot) {
        let mut looks = JoinSet::new();
        for (dir, node) in self.nodes.iter().filter(|(_, node)| now >= node.until) {
            let (dir, followers) = (dir.clone(), node.followers);
            looks.spawn(async move {
                let look = timeout(ANSWER_WITHIN, look_at(&dir, followers)).await;
                (dir, look.unwrap_or(Look::Silent))
            });
        }
        for (dir, look) in looks.join_all().await {
            let Some(node) = self.nodes.get_mut(&dir) else {
                continue;
            };
            if node.is_over(look, Boot::now())
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
    /// Counts a look; `true`: enough of them.
    fn is_over(&mut self, look: Look, now: Boot) -> bool {
        match look {
            Look::Well => (self.missing, self.silent_since) = (0, None),
            Look::Alone => {
                self.silent_since = None;
                self.missing += 1;
            }
            Look::Silent => {
                let since = *self.silent_since.get_or_insert(now);
                return now >= since.plus(SILENT_MAX);
            }
        }
        self.missing >= MISSING_LOOKS
    }
}

fn guarded(watched: Watched) -> (PathBuf, Guarded) {
    let node = Guarded {
        followers: watched.followers,
        until: watched.until,
        missing: 0,
        silent_since: None,
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

async fn look_at(dir: &std::path::Path, followers: usize) -> Look {
    let ask = async {
        let dir = open(dir)?;
        let secret = dir.admin_secret().ok()?;
        let mut control = Control::unix(dir.socket(), ADMIN_USER, &secret)
            .await
            .ok()?;
        Info::read(&mut control, "replication").await.ok()
    };
    match ask.await {
        Some(info) => judge(&info, followers),
        None => Look::Silent,
    }
}

fn judge(info: &Info, followers: usize) -> Look {
    if info.text("role") == "slave" {
        return Look::Well;
    }
    let lines = (0u32..).map_while(|n| match info.text(&format!("slave{n}")) {
        "" => None,
        line => Some(line),
    });
    let well = lines.filter(|line| {
        let field = |name| {
            line.split(',')
                .find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
        };
        let lag = field("lag").and_then(|lag| lag.parse::<u64>().ok());
        field("state") == Some("online") && lag.is_some_and(|lag| lag <= LAG_MAX_S)
    });
    match well.count() >= followers {
        true => Look::Well,
        false => Look::Alone,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(replicas: &[(&str, u64)]) -> Info {
        let lines = replicas.iter().enumerate().map(|(n, (state, lag))| {
            format!("slave{n}:ip=127.0.0.1,port=7,state={state},offset=9,lag={lag}\r\n")
        });
        Info::parse(&format!("role:master\r\n{}", lines.collect::<String>()))
    }

    fn node(until: Boot) -> Guarded {
        guarded(Watched {
            dir: "n".into(),
            followers: 2,
            until,
        })
        .1
    }

    #[test]
    fn only_followers_that_have_just_answered_count() {
        assert_eq!(judge(&info(&[("online", 0), ("online", 1)]), 2), Look::Well);
        assert_eq!(
            judge(&info(&[("online", 0), ("online", 2)]), 2),
            Look::Alone
        );
        assert_eq!(
            judge(&info(&[("online", 0), ("wait_bgsave", 0)]), 2),
            Look::Alone
        );
        assert_eq!(judge(&info(&[]), 0), Look::Well);
        assert_eq!(judge(&Info::parse("role:slave\r\n"), 2), Look::Well);
    }

    #[test]
    fn one_look_that_misses_a_follower_kills_nothing_and_two_in_a_row_do() {
        let mut node = node(Boot(0));
        assert!(!node.is_over(Look::Alone, Boot(1)));
        assert!(!node.is_over(Look::Well, Boot(2)));
        assert!(!node.is_over(Look::Alone, Boot(3)));
        assert!(node.is_over(Look::Alone, Boot(4)));
    }

    #[test]
    fn silence_is_borne_for_a_second() {
        let mut node = node(Boot(0));
        assert!(!node.is_over(Look::Silent, Boot(100)));
        assert!(!node.is_over(Look::Silent, Boot(1_099)));
        assert!(node.is_over(Look::Silent, Boot(1_100)));
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
        assert!(watch.is_due(Boot(5)) && !watch.is_due(Boot(4)));
    }
}
