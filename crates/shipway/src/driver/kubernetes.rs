//! The driver `kubernetes`: daemons in the pods of a Deployment, or of a StatefulSet where their
//! state is to last, which `kubectl` makes and reaches.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    path::Path,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Map, Value, json};
use shipway_client::Location;
use shipway_fault::{Context, Fault, Result};
use shipway_gocompat::{GoDuration, Url, parse_bool};
use shipway_oci::Digest;

use super::{CONFIG_DIR, IMAGE, State, arguments, option, program::Program, variables};
use crate::builders::Node;

/// All options but variables.
pub(super) const OPTIONS: &[&str] = &[
    "image",
    "namespace",
    "replicas",
    "requests.cpu",
    "requests.memory",
    "requests.ephemeral-storage",
    "limits.cpu",
    "limits.memory",
    "limits.ephemeral-storage",
    "persistent-volume-claim.requests.storage",
    "rootless",
    "schedulername",
    "serviceaccount",
    "nodeselector",
    "annotations",
    "labels",
    "tolerations",
    "loadbalance",
    "qemu.install",
    "qemu.image",
    "buildkit-root-volume-memory",
    "default-load",
    "timeout",
];
/// What stays as it is in an address (RFC 3986).
const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
/// The container of a pod in which the daemon is.
const CONTAINER: &str = "buildkitd";
/// On pods: the platforms that the node was created for.
const PLATFORMS: &str = "buildx.docker.com/platform";
/// On pods: the builder's node.
const APP: &str = "app";
const QEMU: &str = "tonistiigi/binfmt:latest";
/// What has the state of a pod.
const CLAIM: &str = "buildkitd";
const STATE_DIR: &str = "/var/lib/buildkit";
/// How long pods may take to be ready, as in buildx.
const PATIENCE: &str = "120s";
/// Most pods of a node.
const MAX_REPLICAS: u32 = 1000;

/// Options with values of their own kinds.
#[derive(Debug, Default)]
pub(super) struct Options {
    replicas: u32,
    rootless: bool,
    random: bool,
    qemu: bool,
    selector: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    labels: BTreeMap<String, String>,
    tolerations: Vec<Value>,
    timeout: String,
}

impl Options {
    pub(super) fn of(options: Option<&BTreeMap<String, String>>) -> Result<Self> {
        let get = |name: &str| options.and_then(|o| o.get(name)).filter(|v| !v.is_empty());
        let invalid = |name: &str, value: &str| {
            Fault::invalid(format!("the option {name} has the invalid value {value:?}"))
        };
        let flag = |name: &str| match get(name) {
            Some(value) => parse_bool(value).ok_or_else(|| invalid(name, value)),
            None => Ok(false),
        };
        let pairs = |name: &str| {
            let list = get(name).map(|v| v.trim_matches('"')).unwrap_or_default();
            let words = list.split(',').filter(|word| !word.is_empty());
            let pair = |word: &str| match word.split_once('=') {
                Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
                None => Err(invalid(name, list)),
            };
            words.map(pair).collect::<Result<BTreeMap<_, _>>>()
        };
        let replicas = match get("replicas") {
            Some(value) => {
                let count = value.parse().ok().filter(|n| (1..=MAX_REPLICAS).contains(n));
                count.ok_or_else(|| invalid("replicas", value))?
            }
            None => 1,
        };
        let random = match get("loadbalance").map(String::as_str) {
            None | Some("sticky") => false,
            Some("random") => true,
            Some(other) => return Err(invalid("loadbalance", other).hint("it is sticky or random")),
        };
        let timeout = match get("timeout") {
            Some(value) => {
                value.parse::<GoDuration>().map_err(|_| invalid("timeout", value))?;
                value.clone()
            }
            None => PATIENCE.to_owned(),
        };
        let (annotations, labels) = (pairs("annotations")?, pairs("labels")?);
        if annotations.contains_key(PLATFORMS) || labels.contains_key(APP) {
            return Err(Fault::invalid(format!(
                "the annotation {PLATFORMS} and the label {APP} are the driver's own"
            )));
        }
        Ok(Self {
            replicas,
            rootless: flag("rootless")?,
            random,
            qemu: flag("qemu.install")?,
            selector: pairs("nodeselector")?,
            annotations,
            labels,
            tolerations: tolerations(get("tolerations").map_or("", String::as_str))?,
            timeout,
        })
    }
}

/// `key=…,operator=…,value=…,effect=…,tolerationSeconds=…`, several with semicolons between.
fn tolerations(list: &str) -> Result<Vec<Value>> {
    let one = |text: &str| {
        let mut fields = Map::new();
        for (key, value) in text.split(',').filter_map(|pair| pair.split_once('=')) {
            let value = match key {
                "key" | "operator" | "value" | "effect" => json!(value),
                "tolerationSeconds" => json!(value.parse::<i64>().map_err(|_| {
                    Fault::invalid(format!("{value:?} is not a number of seconds"))
                })?),
                _ => return Err(Fault::invalid(format!("invalid toleration {text:?}"))),
            };
            fields.insert(key.to_owned(), value);
        }
        Ok(fields.into())
    };
    list.split(';').filter(|text| !text.is_empty()).map(one).collect()
}

/// The endpoint of a new node: where it is configured, and what it is.
pub(crate) fn endpoint(builder: &str, node: &str, kubeconfig: &str) -> String {
    // As Go writes a value of a query.
    let escaped = utf8_percent_encode(kubeconfig, UNRESERVED).to_string().replace("%20", "+");
    format!("kubernetes:///{builder}?deployment={node}&kubeconfig={escaped}")
}

/// A name for a node that no other has in the cluster, as buildx makes them.
pub(crate) fn new_node() -> Result<String> {
    let (id, more) = (shipway_host::random_id()?, shipway_host::random_id()?);
    let hex = Digest::of(format!("{id}{more}")).hex();
    let id = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..32]].join("-");
    Ok(format!("buildkit-{id}-{}", &hex[32..37]))
}

/// The name of what is in the cluster.
fn deployment(node: &Node) -> String {
    node.name.replace('_', "-")
}

fn kubectl(node: &Node) -> Program {
    let query = node.endpoint.split_once('?').map_or("", |(_, query)| query);
    let config =
        Url::pairs(query).into_iter().find(|(key, path)| key == "kubeconfig" && !path.is_empty());
    let config = config.map(|(_, path)| format!("--kubeconfig={path}"));
    let namespace = option(node, "namespace");
    let namespace = namespace.map(|name| format!("--namespace={name}"));
    let before = config.into_iter().chain(namespace).collect();
    Program::new("kubectl", "install kubectl, for example the package kubernetes-client", before)
}

/// `Deployment`, or `StatefulSet` where the state of pods lasts.
fn kind(node: &Node) -> &'static str {
    match option(node, "persistent-volume-claim.requests.storage") {
        Some(_) => "statefulset",
        None => "deployment",
    }
}

pub(super) async fn state(node: &Node) -> Result<State> {
    let asked =
        ["get", kind(node), &deployment(node), "--output", "jsonpath={.status.readyReplicas}"];
    let said = kubectl(node).run(&asked, None).await?;
    if said.failed_with("notfound") {
        return Ok(State::Inactive);
    }
    Ok(match said.ok()?.trim().parse::<u32>() {
        Ok(1..) => State::Running,
        _ => State::Stopped,
    })
}

/// Makes what is missing in the cluster and waits for it; where to connect to.
pub(super) async fn boot(node: &Node) -> Result<Location> {
    let (kubectl, name) = (kubectl(node), deployment(node));
    let options = Options::of(node.driver_opts.as_ref())?;
    if state(node).await? == State::Inactive {
        let text = manifest(node, &options)?.to_string();
        kubectl.ok(&["apply", "--filename", "-"], Some(&text)).await?;
    }
    let (what, patience) =
        (format!("{}/{name}", kind(node)), format!("--timeout={}", options.timeout));
    let ready = kubectl.ok(&["rollout", "status", &what, &patience], None).await;
    ready.map_err(|f| f.hint(format!("`kubectl describe {what}` may say why")))?;
    let selector = format!("{APP}={name}");
    let asked = ["get", "pods", "--selector", &selector, "--output", "json"];
    let pods = kubectl.ok(&asked, None).await?;
    let here = std::env::current_dir().unwrap_or_default();
    let pod = choose(&pods, &options, &here)?;
    let container = format!("--container={CONTAINER}");
    let argv = kubectl.argv(&["exec", "-i", &pod, &container, "--", "buildctl", "dial-stdio"]);
    Ok(Location::Command { url: format!("kube-pod://{pod}"), argv })
}

/// A pod that runs: the same one for all builds in a directory, whose cache it therefore has, or
/// any.
fn choose(pods: &str, options: &Options, directory: &Path) -> Result<String> {
    let list: Value = serde_json::from_str(pods)
        .map_err(|e| Fault::invalid(format!("what kubectl says of pods cannot be read: {e}")))?;
    let runs = |pod: &&Value| {
        pod["metadata"]["deletionTimestamp"].is_null() && pod["status"]["phase"] == "Running"
    };
    let items = list["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let names = items.iter().filter(runs).filter_map(|pod| pod["metadata"]["name"].as_str());
    let names = names.filter(|name| !name.starts_with('-'));
    let salt = match options.random {
        true => shipway_host::random_id()?,
        false => directory.display().to_string(),
    };
    // Other pods coming and going change the choice for few directories only.
    let chosen = names.max_by_key(|name| Digest::of(format!("{salt}\n{name}")).hex());
    chosen.map(str::to_owned).ok_or_else(|| Fault::unavailable("no running buildkit pods found"))
}

/// What is made in the cluster for a node.
fn manifest(node: &Node, options: &Options) -> Result<Value> {
    let name = deployment(node);
    let mut labels = options.labels.clone();
    labels.insert(APP.to_owned(), name.clone());
    let mut annotations = options.annotations.clone();
    if let Some(platforms) = node.platforms.as_ref().filter(|p| !p.is_empty()) {
        let list: Vec<String> = platforms.iter().map(ToString::to_string).collect();
        annotations.insert(PLATFORMS.to_owned(), list.join(","));
    }
    let meta = |name: &str, labels: Option<&BTreeMap<String, String>>| {
        let mut meta = json!({"name": name, "annotations": annotations});
        if let Some(labels) = labels {
            meta["labels"] = json!(labels);
        }
        meta
    };
    let (mut volumes, mut mounts, mut items) = (Vec::new(), Vec::new(), Vec::new());
    for (n, (dir, files)) in directories(node)?.into_iter().enumerate() {
        let part = if n == 0 { "config".to_owned() } else { format!("config-{n}") };
        let map = format!("{name}-{part}");
        items.push(json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": meta(&map, None), "data": files,
        }));
        let path = [CONFIG_DIR, &dir].join("/");
        mounts.push(json!({"name": part, "mountPath": path.trim_end_matches('/')}));
        volumes.push(json!({"name": part, "configMap": {"name": map}}));
    }
    let mut args = arguments(node);
    let mut security = json!({"privileged": true});
    let mut pod_annotations = annotations.clone();
    let memory = option(node, "buildkit-root-volume-memory");
    let in_memory = |size: &str| json!({"medium": "Memory", "sizeLimit": size});
    if options.rootless {
        args.push("--oci-worker-no-process-sandbox".to_owned());
        security = json!({"seccompProfile": {"type": "Unconfined"}});
        pod_annotations.insert(
            format!("container.apparmor.security.beta.kubernetes.io/{CONTAINER}"),
            "unconfined".to_owned(),
        );
        mounts.push(json!({"name": CLAIM, "mountPath": "/home/user/.local/share/buildkit"}));
        volumes.push(json!({"name": CLAIM, "emptyDir": memory.map_or(json!({}), in_memory)}));
    } else if let Some(size) = memory {
        mounts.push(json!({"name": "buildkit-memory", "mountPath": STATE_DIR}));
        volumes.push(json!({"name": "buildkit-memory", "emptyDir": in_memory(size)}));
    }
    let storage = option(node, "persistent-volume-claim.requests.storage");
    if storage.is_some() {
        if options.rootless || memory.is_some() {
            return Err(Fault::invalid(
                "the option persistent-volume-claim.requests.storage excludes rootless and \
                 buildkit-root-volume-memory",
            ));
        }
        mounts.push(json!({"name": CLAIM, "mountPath": STATE_DIR}));
    }
    let probe = json!({
        "exec": {"command": ["buildctl", "debug", "workers"]},
        "failureThreshold": 3, "initialDelaySeconds": 5, "periodSeconds": 30,
        "successThreshold": 1, "timeoutSeconds": 60,
    });
    let amounts = |group: &str| {
        let kinds = ["cpu", "memory", "ephemeral-storage"];
        let of = |kind: &str| {
            let value = option(node, &format!("{group}.{kind}"))?;
            Some((kind.to_owned(), json!(value)))
        };
        kinds.into_iter().filter_map(of).collect::<Map<String, Value>>()
    };
    let variables = variables(node).map(|(name, value)| json!({"name": name, "value": value}));
    let image = match (option(node, "image"), options.rootless) {
        (Some(image), _) => image.to_owned(),
        (None, true) => format!("{IMAGE}-rootless"),
        (None, false) => IMAGE.to_owned(),
    };
    let container = json!({
        "name": CONTAINER, "image": image, "args": args, "securityContext": security,
        "readinessProbe": probe, "livenessProbe": probe,
        "resources": {"requests": amounts("requests"), "limits": amounts("limits")},
        "env": variables.collect::<Vec<_>>(), "volumeMounts": mounts,
    });
    let mut pod = json!({
        "containers": [container], "volumes": volumes, "tolerations": options.tolerations,
        "nodeSelector": options.selector,
    });
    for (field, name) in
        [("serviceAccountName", "serviceaccount"), ("schedulerName", "schedulername")]
    {
        if let Some(value) = option(node, name) {
            pod[field] = json!(value);
        }
    }
    if options.qemu {
        pod["initContainers"] = json!([{
            "name": "qemu", "image": option(node, "qemu.image").unwrap_or(QEMU),
            "args": ["--install", "all"], "securityContext": {"privileged": true},
        }]);
    }
    let mut spec = json!({
        "replicas": options.replicas,
        "selector": {"matchLabels": labels},
        "template": {
            "metadata": {"labels": labels, "annotations": pod_annotations}, "spec": pod,
        },
    });
    let kind = match storage {
        Some(size) => {
            spec["serviceName"] = json!("buildkitd");
            spec["podManagementPolicy"] = json!("Parallel");
            spec["volumeClaimTemplates"] = json!([{
                "metadata": {"name": CLAIM},
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "resources": {"requests": {"storage": size}},
                },
            }]);
            "StatefulSet"
        }
        None => "Deployment",
    };
    items.push(json!({
        "apiVersion": "apps/v1", "kind": kind, "metadata": meta(&name, Some(&labels)), "spec": spec,
    }));
    Ok(json!({"apiVersion": "v1", "kind": "List", "items": items}))
}

/// The daemon's files by directory, of which the first is the one of its configuration.
fn directories(node: &Node) -> Result<Vec<(String, BTreeMap<String, String>)>> {
    let mut found: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    for (path, data) in node.files.iter().flatten() {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        let bad = || Fault::invalid(format!("the file {path} of the builder cannot be used"));
        if name.is_empty() || path.split('/').any(|part| matches!(part, "." | "..")) {
            return Err(bad());
        }
        let data = STANDARD.decode(data).map_err(|_| bad())?;
        let text = String::from_utf8(data)
            .map_err(|_| bad().hint("a ConfigMap has texts only"))
            .context(|| "make a ConfigMap")?;
        match found.entry(dir.to_owned()) {
            Entry::Vacant(place) => _ = place.insert(BTreeMap::from([(name.to_owned(), text)])),
            Entry::Occupied(mut place) => _ = place.get_mut().insert(name.to_owned(), text),
        }
    }
    Ok(found.into_iter().collect())
}

/// Removes what was made for a node.
pub(super) async fn remove(node: &Node) -> Result<()> {
    let (kubectl, name) = (kubectl(node), deployment(node));
    let mut all = vec![format!("{}/{name}", kind(node))];
    for n in 0..directories(node)?.len() {
        let part = if n == 0 { "config".to_owned() } else { format!("config-{n}") };
        all.push(format!("configmap/{name}-{part}"));
    }
    let words = ["delete", "--ignore-not-found"].into_iter().chain(all.iter().map(String::as_str));
    kubectl.ok(&words.collect::<Vec<_>>(), None).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(options: &[(&str, &str)]) -> Node {
        let options = options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        Node {
            name: "my_node0".to_owned(),
            endpoint: endpoint("b", "my_node0", "/home/me/a b"),
            driver_opts: Some(options.collect()),
            flags: Some(vec!["--debug".to_owned()]),
            files: Some(BTreeMap::from([
                ("buildkitd.toml".to_owned(), "YQ==".to_owned()),
                ("certs/r.io/ca.pem".to_owned(), "Yg==".to_owned()),
            ])),
            ..Node::default()
        }
    }

    fn made(options: &[(&str, &str)]) -> Vec<Value> {
        let node = node(options);
        let options = Options::of(node.driver_opts.as_ref()).unwrap();
        let list = manifest(&node, &options).unwrap();
        list["items"].as_array().unwrap().clone()
    }

    #[test]
    fn pods_are_made_as_buildx_makes_them() {
        let items = made(&[("requests.cpu", "1"), ("limits.memory", "2Gi"), ("env.A", "b")]);
        let names: Vec<&str> =
            items.iter().map(|i| i["metadata"]["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["my-node0-config", "my-node0-config-1", "my-node0"]);
        assert_eq!(items[0]["data"]["buildkitd.toml"], "a");
        let spec = &items[2]["spec"];
        assert_eq!(spec["selector"]["matchLabels"], json!({"app": "my-node0"}));
        let container = &spec["template"]["spec"]["containers"][0];
        assert_eq!(container["image"], IMAGE);
        assert_eq!(
            container["args"],
            json!(["--config", "/etc/buildkit/buildkitd.toml", "--debug"])
        );
        assert_eq!(container["env"], json!([{"name": "A", "value": "b"}]));
        assert_eq!(
            container["resources"],
            json!({"requests": {"cpu": "1"}, "limits": {"memory": "2Gi"}})
        );
        let mounts = container["volumeMounts"].as_array().unwrap();
        assert_eq!(mounts[0]["mountPath"], "/etc/buildkit");
        assert_eq!(mounts[1]["mountPath"], "/etc/buildkit/certs/r.io");
    }

    #[test]
    fn state_that_lasts_is_claimed() {
        let items = made(&[("persistent-volume-claim.requests.storage", "5Gi"), ("replicas", "3")]);
        let set = &items[2];
        assert_eq!((&set["kind"], &set["spec"]["replicas"]), (&json!("StatefulSet"), &json!(3)));
        // The mounts of the configuration stay.
        let mounts = set["spec"]["template"]["spec"]["containers"][0]["volumeMounts"].clone();
        assert_eq!(mounts.as_array().unwrap().len(), 3);
        let rootless = made(&[("rootless", "true")]);
        let container = &rootless[2]["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["image"], format!("{IMAGE}-rootless"));
        assert!(container["securityContext"]["privileged"].is_null());
    }

    #[test]
    fn options_have_their_kinds() {
        let of = |name: &str, value: &str| {
            Options::of(Some(&BTreeMap::from([(name.to_owned(), value.to_owned())])))
        };
        let tolerated = of("tolerations", "key=a,operator=Exists;key=b,tolerationSeconds=5");
        assert_eq!(
            tolerated.unwrap().tolerations,
            [
                json!({"key": "a", "operator": "Exists"}),
                json!({"key": "b", "tolerationSeconds": 5})
            ]
        );
        assert_eq!(of("nodeselector", "\"a=b,c=d\"").unwrap().selector.len(), 2);
        for (name, value) in [
            ("replicas", "0"),
            ("replicas", "1001"),
            ("loadbalance", "round"),
            ("rootless", "maybe"),
            ("timeout", "long"),
            ("nodeselector", "a"),
            ("tolerations", "taste=sweet"),
            ("labels", "app=mine"),
        ] {
            assert!(of(name, value).is_err(), "{name}={value}");
        }
    }

    #[test]
    fn one_directory_has_one_pod() {
        let pod = |name: &str, phase: &str| json!({"metadata": {"name": name}, "status": {"phase": phase}});
        let mut all = vec![pod("a", "Running"), pod("b", "Running"), pod("c", "Pending")];
        all.push(json!({"metadata": {"name": "d", "deletionTimestamp": "x"}, "status": {"phase": "Running"}}));
        let (options, list) = (Options::default(), json!({"items": all}).to_string());
        let of = |dir: &str| choose(&list, &options, Path::new(dir)).unwrap();
        let chosen: Vec<String> = (0..64).map(|n| of(&format!("/{n}"))).collect();
        assert!(chosen.iter().all(|name| name == "a" || name == "b"));
        assert!(chosen.contains(&"a".to_owned()) && chosen.contains(&"b".to_owned()));
        assert_eq!(of("/x"), of("/x"));
        assert!(choose(r#"{"items": []}"#, &options, Path::new("/")).is_err());
    }

    #[test]
    fn the_endpoint_says_where_the_cluster_is() {
        let node = node(&[("namespace", "ns")]);
        assert_eq!(
            node.endpoint,
            "kubernetes:///b?deployment=my_node0&kubeconfig=%2Fhome%2Fme%2Fa+b"
        );
        assert_eq!(
            kubectl(&node).argv(&["get"]),
            ["kubectl", "--kubeconfig=/home/me/a b", "--namespace=ns", "get"]
        );
        let name = new_node().unwrap();
        assert!(name.starts_with("buildkit-") && name.len() == 9 + 36 + 6, "{name}");
    }
}
