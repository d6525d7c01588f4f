//! A network of its own for one run: a bridge, and a namespace for each place, none of which leads
//! outside.
//!
//! Invariant: everything is made under names that carry this run's process id, and [`Net::remove`]
//! takes all of it away with the processes that are still in it; nothing else of the machine's
//! network is touched.

use std::{
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context as _, bail};

/// Of the network that exists inside the run's namespaces only.
const SUBNET: &str = "10.77.0";
/// Addresses below it are for places.
const PLACES_MAX: usize = 200;

/// A namespace with one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Its short name, such as `h1`.
    pub(crate) name: String,
    /// The namespace's name.
    pub(crate) namespace: String,
    /// Its address.
    pub(crate) ip: String,
}

impl Place {
    /// A command that runs there.
    #[must_use]
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.namespace])
            .arg(program);
        command
    }
}

/// All places of a run.
#[derive(Clone, Debug)]
pub(crate) struct Net {
    prefix: String,
    /// In the order in which they were named.
    pub(crate) places: Vec<Place>,
}

impl Net {
    /// The places of a run; they exist once [`Net::make`] has been called.
    ///
    /// # Errors
    /// When there are more than a subnet has.
    pub(crate) fn of(run: u32, names: &[&str]) -> anyhow::Result<Self> {
        if names.len() > PLACES_MAX {
            bail!("at most {PLACES_MAX} places");
        }
        let prefix = format!("smc{run}");
        let places = names.iter().enumerate().map(|(index, name)| Place {
            name: (*name).to_owned(),
            namespace: format!("{prefix}-{name}"),
            ip: format!("{SUBNET}.{}", index + 11),
        });
        Ok(Self {
            places: places.collect(),
            prefix,
        })
    }

    /// The place with this short name.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn place(&self, name: &str) -> anyhow::Result<&Place> {
        let found = self.places.iter().find(|p| p.name == name);
        found.with_context(|| format!("no place {name}"))
    }

    /// The namespace of what joins all places.
    pub(crate) fn switch(&self) -> String {
        format!("{}-net", self.prefix)
    }

    /// Makes the bridge and every namespace. Needs root.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn make(&self) -> anyhow::Result<()> {
        let switch = self.switch();
        ip(&["netns", "add", &switch])?;
        ip(&["-n", &switch, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", "br0", "up"])?;
        for (index, place) in self.places.iter().enumerate() {
            let (port, ns) = (format!("p{index}"), place.namespace.as_str());
            ip(&["netns", "add", ns])?;
            ip(&[
                "-n", &switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0",
                "netns", ns,
            ])?;
            ip(&["-n", &switch, "link", "set", &port, "master", "br0", "up"])?;
            let address = format!("{}/24", place.ip);
            ip(&["-n", ns, "addr", "add", &address, "dev", "eth0"])?;
            ip(&["-n", ns, "link", "set", "eth0", "up"])?;
            ip(&["-n", ns, "link", "set", "lo", "up"])?;
        }
        Ok(())
    }

    /// Processes of a place.
    ///
    /// # Errors
    /// When there is no such namespace.
    pub(crate) fn pids(&self, namespace: &str) -> anyhow::Result<Vec<u32>> {
        let listed = ip(&["netns", "pids", namespace])?;
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let pids = listed.split_whitespace().filter_map(|p| p.parse().ok());
        Ok(pids.collect())
    }

    /// Kills whatever runs in a place.
    pub(crate) fn empty(&self, namespace: &str) {
        for pid in self.pids(namespace).unwrap_or_default() {
            // It may have ended meanwhile.
            let _ = slotmesh_harness::signals::kill(pid);
        }
    }

    /// Kills what still runs in the namespaces, and removes them.
    pub(crate) fn remove(&self) {
        let names = self.places.iter().map(|p| p.namespace.clone());
        for namespace in names.chain([self.switch()]) {
            self.empty(&namespace);
            // The rest is removed all the same; what is not there needs no removing.
            let _ = ip(&["netns", "del", &namespace]);
        }
    }

    /// Cuts a place off from all others, both ways.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn cut(&self, name: &str) -> anyhow::Result<()> {
        self.link(name, "down")
    }

    /// Ends everything that was done to a place's network.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn heal(&self, name: &str) -> anyhow::Result<()> {
        self.link(name, "up")?;
        nft(self.place(name)?, &["flush", "ruleset"])
    }

    fn link(&self, name: &str, state: &str) -> anyhow::Result<()> {
        self.within(&["link", "set", &self.port(name)?, state])
    }

    /// The end of a place's link that is in the switch.
    ///
    /// # Errors
    /// When there is no such place.
    pub(crate) fn port(&self, name: &str) -> anyhow::Result<String> {
        let index = self.places.iter().position(|p| p.name == name);
        let index = index.with_context(|| format!("no place {name}"))?;
        Ok(format!("p{index}"))
    }

    /// `ip` in the switch.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn within(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let switch = self.switch();
        let whole = ["-n", &switch].into_iter().chain(arguments.iter().copied());
        ip(&whole.collect::<Vec<_>>()).map(drop)
    }

    /// Lets nothing out of `from` to `to`; what `to` sends still arrives.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn deafen(&self, from: &str, to: &[&str]) -> anyhow::Result<()> {
        let from = self.place(from)?;
        for name in to {
            let rule = format!("ip daddr {}", self.place(name)?.ip);
            drop_output(from, &[&rule])?;
        }
        Ok(())
    }

    /// Cuts `from` and `to` off from each other, and from nobody else.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn part(&self, from: &str, to: &[&str]) -> anyhow::Result<()> {
        self.deafen(from, to)?;
        to.iter().try_for_each(|name| self.deafen(name, &[from]))
    }

    /// Loses one packet in `of` that leave the place, at random.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn lose(&self, name: &str, of: u32) -> anyhow::Result<()> {
        let rule = format!("oif eth0 numgen random mod {of} 0");
        drop_output(self.place(name)?, &[&rule])
    }
}

/// Adds a rule that drops what leaves a place.
fn drop_output(place: &Place, rules: &[&str]) -> anyhow::Result<()> {
    nft(place, &["add", "table", "inet", "chaos"])?;
    let hook = "{ type filter hook output priority 0 ; }";
    nft(place, &["add", "chain", "inet", "chaos", "out", hook])?;
    for rule in rules {
        let rule = format!("{rule} drop");
        nft(place, &["add", "rule", "inet", "chaos", "out", &rule])?;
    }
    Ok(())
}

fn nft(place: &Place, arguments: &[&str]) -> anyhow::Result<()> {
    let mut command = place.command(Path::new("nft"));
    command.arg(arguments.join(" "));
    run(&mut command).map(drop)
}

fn ip(arguments: &[&str]) -> anyhow::Result<Output> {
    run(Command::new("ip").args(arguments))
}

/// Runs a program to its end.
///
/// # Errors
/// With its own words, when it fails.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<Output> {
    let output = command
        .output()
        .with_context(|| format!("run {command:?}: are iproute2 and nftables installed?"))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {} (network namespaces need root)",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(output)
}
