//! The bill of what is linked into the agent, as CycloneDX 1.5, from what cargo itself says.
use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use dhcp_reclaim_tests::sandbox::run;
use serde_json::{Value, json};

use crate::cargo::cargo;

const AGENT: &str = "dhcp-reclaim-agent";

pub fn metadata(target: &str) -> Result<Value> {
    let json = run(cargo()
        .args(["metadata", "--format-version=1", "--locked"])
        .args(["--filter-platform", target]))?;
    Ok(serde_json::from_str(&json)?)
}

/// Of the agent.
pub fn version(metadata: &Value) -> Result<String> {
    let packages = metadata["packages"].as_array().context("no packages")?;
    let agent = packages.iter().find(|package| package["name"] == AGENT);
    let version = agent.and_then(|agent| agent["version"].as_str());
    Ok(version.context("no version of the agent")?.to_owned())
}

pub fn of(metadata: &Value) -> Result<Value> {
    let packages: BTreeMap<&str, &Value> = metadata["packages"]
        .as_array()
        .context("no packages")?
        .iter()
        .filter_map(|package| Some((package["id"].as_str()?, package)))
        .collect();
    let linked: BTreeMap<&str, BTreeSet<&str>> = metadata["resolve"]["nodes"]
        .as_array()
        .context("nothing is resolved")?
        .iter()
        .filter_map(|node| Some((node["id"].as_str()?, linked(node))))
        .collect();
    let agent = packages
        .iter()
        .find(|(_, package)| package["name"] == AGENT)
        .map(|(id, _)| *id)
        .context("no agent among the packages")?;

    let mut open = vec![agent];
    let mut seen = BTreeSet::new();
    while let Some(id) = open.pop() {
        if seen.insert(id) {
            open.extend(linked.get(id).into_iter().flatten());
        }
    }
    let mut components = Vec::new();
    let mut dependencies = Vec::new();
    for id in &seen {
        let package = packages.get(id).context("a package without an entry")?;
        if *id != agent {
            components.push(component(package, "library")?);
        }
        let needs = linked.get(id).into_iter().flatten();
        let needs: Vec<String> = needs
            .map(|id| purl(packages.get(id).context("a package without an entry")?))
            .collect::<Result<_>>()?;
        dependencies.push(json!({ "ref": purl(package)?, "dependsOn": needs }));
    }
    ensure!(components.len() > 20, "too few components to be true");
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": { "component": component(packages[agent], "application")? },
        "components": components,
        "dependencies": dependencies,
    }))
}

/// Packages whose code becomes part of this one: not what only builds or tests it.
fn linked(node: &Value) -> BTreeSet<&str> {
    let all = node["deps"].as_array().into_iter().flatten();
    let normal = all.filter(|dep| {
        let mut kinds = dep["dep_kinds"].as_array().into_iter().flatten();
        kinds.any(|kind| kind["kind"].is_null())
    });
    normal.filter_map(|dep| dep["pkg"].as_str()).collect()
}

fn component(package: &Value, kind: &str) -> Result<Value> {
    let purl = purl(package)?;
    let license = package["license"].as_str();
    let license = license.with_context(|| format!("{purl} has no licence"))?;
    Ok(json!({
        "type": kind,
        "bom-ref": purl,
        "name": package["name"],
        "version": package["version"],
        // Some crates still write a slash for an OR.
        "licenses": [{ "expression": license.replace('/', " OR ") }],
        "purl": purl,
    }))
}

fn purl(package: &Value) -> Result<String> {
    let name = package["name"].as_str().context("no name")?;
    let version = package["version"].as_str().context("no version")?;
    Ok(format!("pkg:cargo/{name}@{version}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bill_has_what_is_linked_and_nothing_that_only_builds_or_tests() {
        let bill = of(&metadata("x86_64-unknown-linux-gnu").unwrap()).unwrap();
        let components = bill["components"].as_array().unwrap();
        let names: BTreeSet<&str> = components
            .iter()
            .filter_map(|component| component["name"].as_str())
            .collect();
        for name in ["aya", "redb", "tokio", "libc"] {
            assert!(names.contains(name), "{name}");
        }
        for name in ["aya-build", "proptest", "xtask", "dhcp-reclaim-tests"] {
            assert!(!names.contains(name), "{name}");
        }
        let references: BTreeSet<&str> = components
            .iter()
            .chain([&bill["metadata"]["component"]])
            .filter_map(|component| component["bom-ref"].as_str())
            .collect();
        assert_eq!(references.len(), components.len() + 1);
        for needs in bill["dependencies"].as_array().unwrap() {
            for need in needs["dependsOn"].as_array().unwrap() {
                assert!(references.contains(need.as_str().unwrap()), "{need}");
            }
        }
    }
}
