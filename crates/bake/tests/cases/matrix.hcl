variable "REGISTRY" {
  default = "example.org"
}

function "ref" {
  params          = [name, tag]
  variadic_params = more
  result          = "${REGISTRY}/${name}:${join("-", concat([tag], more))}"
}

target "app" {
  name = "app-${item.os}-${replace(version, ".", "_")}"
  matrix = {
    item = [
      { os = "alpine", extra = ["small"] },
      { os = "debian", extra = [] },
    ]
    version = ["1.0", "2.0"]
  }
  tags   = [ref("app", version, item.os, item.extra...)]
  args   = { for k, v in { os = item.os, none = "" } : upper(k) => v if v != "" }
  target = version == "1.0" ? "old" : "new"
}

target "all" {
  contexts = { for t in ["alpine", "debian"] : t => "target:app-${t}-1_0" }
  labels = {
    tags  = join(" ", flatten([target.app-alpine-1_0.tags, target.app-debian-1_0.tags]))
    first = target.app-alpine-2_0.args["OS"]
    list  = "%{ for i, t in split(",", "a,b") ~}${i}=${t} %{ endfor ~}."
    lines = "%{ if REGISTRY == "" }none%{ else }${REGISTRY}%{ endif }"
  }
}

group "default" {
  targets = ["all"]
}
